"""From messages and prompts to ids: what is merged, continued, counted and too long."""

from __future__ import annotations

from typing import Any

import pytest

from llama import Llama
from llama.serving.endpoints import CHAT_URL, COMPLETIONS_URL, read_request
from llama.serving.errors import ApiError
from llama.serving.jobs import Job, Planner, as_completed

CONTEXT = 64  # of the fixture `llama`


@pytest.fixture(scope="module")
def planner(llama: Llama) -> Planner:
    return Planner(llama, 8, "llama")


def job(planner: Planner, **body: Any) -> Job:
    url = CHAT_URL if "messages" in body else COMPLETIONS_URL
    return read_request(url, body, planner).job


def say(*turns: str) -> list[dict[str, str]]:
    """Messages such as "user: hi"."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def test_neighbouring_messages_of_one_role_are_joined_by_a_blank_line(planner: Planner) -> None:
    split = say("system: a", "system: b", "user: c", "user: d", "assistant: e", "assistant: f", "user: g")
    joined = say("system: a\n\nb", "user: c\n\nd", "assistant: e\n\nf", "user: g")
    assert planner.dialog(split) == planner.dialog(joined)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("turns", "name"),
    [
        (["system: a", "system: b"], "messages[0]"),
        (["user: a", "user: b", "system: c", "user: d"], "messages[2]"),
        (["system: a", "system: b", "assistant: c"], "messages[2]"),
        (["user: a", "user: b", "assistant: c", "assistant: d"], "messages[2]"),
        (["user: a", "tool: b"], "messages[1].role"),
        (["function: a"], "messages[0].role"),
    ],
)
def test_what_is_no_dialog_is_an_error_with_the_number_of_the_message(
    planner: Planner, turns: list[str], name: str
) -> None:
    with pytest.raises(ApiError) as raised:
        job(planner, messages=say(*turns))
    assert raised.value.param == name


def test_an_answer_is_continued_after_what_the_template_has_in_front_of_it(planner: Planner) -> None:
    whole = planner.tokenizer.encode("[INST] hi [/INST] Sure, the", bos=True, eos=False)
    continued = job(planner, messages=say("user: hi", "assistant:  Sure, the"), continue_final_message=True)
    assert continued.prompts == [whole]
    assert continued.continues
    without = job(planner, messages=say("user: hi", "assistant: "), continue_final_message=True)
    assert without.prompts == job(planner, messages=say("user: hi"), add_generation_prompt=True).prompts
    for turns, wrong in ((["user: hi"], {}), (["user: hi", "assistant: x"], {"add_generation_prompt": True})):
        with pytest.raises(ApiError):
            job(planner, messages=say(*turns), continue_final_message=True, **wrong)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [1] * (CONTEXT + 1)},
        {"prompt": ["x", "llama " * CONTEXT]},
        {"prompt": "llama " * 100_000},
        {"prompt": "x", "max_tokens": CONTEXT},
        {"prompt": "x", "max_tokens": 10**30},
        {"messages": say("user: " + "llama " * CONTEXT)},
        {"messages": say("user: " + "llama " * 100_000)},
        {"messages": say("user: hi"), "max_tokens": CONTEXT},
        {"messages": say("user: hi"), "max_completion_tokens": CONTEXT},
        {"messages": say("user: hi") * (CONTEXT + 1)},
    ],
)
def test_a_context_that_is_too_small_is_said_in_the_words_that_clients_look_for(
    planner: Planner, body: dict[str, Any]
) -> None:
    with pytest.raises(
        ApiError, match=f"^This model's maximum context length is {CONTEXT} tokens. However, "
    ) as raised:
        job(planner, **body)
    assert raised.value.code == "context_length_exceeded"
    assert raised.value.status == 400


def test_a_request_may_fill_the_context(planner: Planner) -> None:
    assert job(planner, prompt=[1] * 5, max_tokens=CONTEXT - 5).params.max_gen_len == CONTEXT - 5


def test_too_many_items_are_refused_before_each_is_looked_at(planner: Planner) -> None:
    class Items(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("the items were looked at")

    for body in ({"prompt": Items(["x"] * 9)}, {"prompt": Items([1] * 65)}, {"messages": Items([{}] * 65)}):
        with pytest.raises(ApiError, match=r"at most 8, got 9|maximum context length"):
            job(planner, **body)


def test_sampling_parameters_have_the_librarys_names(planner: Planner) -> None:
    given: dict[str, Any] = {
        **{"top_k": 5, "min_p": 0.1, "typical_p": 0.5, "repetition_penalty": 1.5, "presence_penalty": 1},
        **{"frequency_penalty": -1, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [7]},
    }
    for body in ({"prompt": "a"}, {"messages": say("user: hi")}):
        params = job(planner, **body, **given, logit_bias={"5": 2}).params
        assert params.options() == given | {"logit_bias": {5: 2.0}, "stop_token_ids": (7,)}
        assert job(planner, **body).params.options() == {}


@pytest.mark.parametrize("wrong", [{"logit_bias": {"99999": 1}}, {"stop_token_ids": [99999]}, {"logit_bias": {"a": 1}}])
def test_ids_of_sampling_parameters_are_in_the_vocabulary(planner: Planner, wrong: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as raised:
        job(planner, prompt="a", **wrong)
    assert raised.value.param == next(iter(wrong))


def test_forms_of_answers_are_checked_before_they_run(planner: Planner) -> None:
    pytest.importorskip("llguidance", reason="needs the package llguidance, of the extra [structured]")
    form = job(planner, messages=say("user: hi"), response_format={"type": "json_object"}).params.form
    assert form is not None and form.kind == "json_schema"
    with pytest.raises(ApiError, match="regex must be one that llguidance supports"):
        job(planner, prompt="a", structured_outputs={"regex": "(["})


@pytest.mark.parametrize(
    "options", [{"top_k": 3, "repetition_penalty": 1.4}, {"structured_outputs": {"regex": "[a-z]{9}"}}]
)
def test_each_of_several_completions_has_its_own_processors(
    llama: Llama, planner: Planner, options: dict[str, Any]
) -> None:
    """The j-th of n is the one that its seed gives alone."""
    if "structured_outputs" in options:
        pytest.importorskip("llguidance", reason="needs the package llguidance, of the extra [structured]")
    body: dict[str, Any] = {"prompt": "fox fox", "max_tokens": 6, **options}
    together = job(planner, **body, seed=5, n=3)
    alone = [(i, job(planner, **body, seed=5 + i)) for i in range(3)]
    (_, found), *_ = as_completed(llama, [("all", together)])
    assert not isinstance(found, Exception)
    expected = {key: pieces[0].text for key, pieces in as_completed(llama, alone) if not isinstance(pieces, Exception)}
    assert [piece.text for piece in found] == [expected[i] for i in range(3)]
