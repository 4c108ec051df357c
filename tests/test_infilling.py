"""Infilling: prompts written out by hand, and a network trained until each pair of texts has one right answer."""

from __future__ import annotations

import itertools
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import example_infilling
from llama import Llama, Tokenizer
from llama.errors import PromptError
from llama.generation import infilling_prompt_tokens
from tests.support import oracle
from tests.support.ranks import run_ranks
from tests.support.serving import running, web_of
from tests.support.tokenizers import INFILLING_PIECES, Foreign

PREFIXES = ["def fox(", "    jumps over ", "The lazy dog"]
SUFFIXES = ["):\n    return 1\n", " and eat grass\n", ""]
# Every pair's own text: with a leading space or none, several lines, bytes, nothing.
MIDDLES = ["", "x, y", " 12", "\n\n  day", "café", "🙂", " ", "lazy dog, lazy", "\t= 3"]
PAIRS = dict(zip(itertools.product(PREFIXES, SUFFIXES), MIDDLES, strict=True))
NETWORK = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 16, "norm_eps": 1e-5}


def by_hand(tokenizer: Tokenizer, prefix: str, suffix: str, suffix_first: bool) -> list[int]:
    """The prompt by the ids of its parts."""
    sp = tokenizer.sp_model
    pre, mid, suf = (sp.piece_to_id(f"\u2581<{name}>") for name in ("PRE", "MID", "SUF"))
    before, after = sp.encode(prefix), sp.encode("\u263a" + suffix)[2:]
    return [1, pre, suf, *after, mid, *before] if suffix_first else [1, pre, *before, suf, *after, mid]


def test_the_prompt_has_its_parts_in_order(code_tokenizer: Tokenizer) -> None:
    texts = [*PREFIXES, *SUFFIXES, " <PRE> ", "日本 🙂", "  two"]
    for parts in itertools.product(texts, texts, (False, True)):
        assert infilling_prompt_tokens(code_tokenizer, *parts) == by_hand(code_tokenizer, *parts)


def train(tokenizer: Tokenizer, params: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights that know the answer to each pair, in both orders, and that `<EOT>` follows it."""
    sp, rng = tokenizer.sp_model, random.Random(0)
    rows, targets = [], []
    for ((prefix, suffix), middle), order in itertools.product(PAIRS.items(), (False, True)):
        prompt = by_hand(tokenizer, prefix, suffix, order)
        answer = [*sp.encode("\u263a" + middle)[2:], sp.piece_to_id("\u2581<EOT>")]
        rows.append(prompt + answer)
        targets.append([-100] * (len(prompt) - 1) + answer)
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    wanted = torch.tensor([row + [-100] * (width - len(row)) for row in targets])
    state = {name: w.requires_grad_() for name, w in oracle.random_state(params, seed=1).items()}
    optimizer = torch.optim.AdamW(state.values(), 3e-3, weight_decay=0.0)
    for _ in range(150):
        some = torch.tensor(rng.sample(range(len(rows)), 12))
        logits = oracle.logits(state, params, tokens[some])
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    return {name: w.detach() for name, w in state.items()}


@pytest.fixture(scope="module")
def split(
    code_tokenizer: Tokenizer, code_tokenizer_path: Path, write_checkpoint: Callable[..., Path]
) -> Callable[[int], Path]:
    """Writes the trained network in as many files as asked for, with its tokenizer."""
    params = NETWORK | {"vocab_size": code_tokenizer.n_words}
    state = train(code_tokenizer, params)

    def write(n_files: int) -> Path:
        written = write_checkpoint(params, state, n_files)
        shutil.copyfile(code_tokenizer_path, written / "tokenizer.model")
        return written

    return write


@pytest.fixture(scope="module")
def folder(split: Callable[[int], Path]) -> Path:
    return split(1)


@pytest.fixture(scope="module")
def code_llama(folder: Path) -> Llama:
    return Llama.build(folder, folder / "tokenizer.model", 128, 4, device="cpu", dtype="float32")


def as_lists() -> tuple[list[str], list[str]]:
    return [prefix for prefix, _ in PAIRS], [suffix for _, suffix in PAIRS]


@pytest.mark.parametrize("suffix_first", [False, True])
def test_each_pair_gets_its_text(code_llama: Llama, suffix_first: bool) -> None:
    results = code_llama.text_infilling(*as_lists(), temperature=0, logprobs=True, suffix_first=suffix_first)
    assert [result["generation"] for result in results] == MIDDLES
    for result, (prefix, suffix) in zip(results, PAIRS, strict=True):
        assert result["full_text"] == prefix + result["generation"] + suffix
        assert result["finish_reason"] == "stop"
        assert "".join(result["tokens"]) == result["generation"]
        assert len(result["logprobs"]) == len(result["tokens"]) and all(-0.5 < p < 0 for p in result["logprobs"])


@pytest.mark.parametrize("speculative", [None, "prompt_lookup"])
def test_a_stream_yields_the_same_text(code_llama: Llama, speculative: str | None) -> None:
    for (prefix, suffix), middle in PAIRS.items():
        stream = code_llama.stream_text_infilling(prefix, suffix, temperature=0, speculative=speculative)
        assert "".join(stream) == middle


def test_a_stop_string_ends_an_answer(code_llama: Llama) -> None:
    prefixes, suffixes = as_lists()
    results = code_llama.text_infilling(prefixes, suffixes, temperature=0, stop=["y", " dog", "\n"])
    assert [result["generation"] for result in results] == ["", "x, ", " 12", "", "café", "🙂", " ", "laz", "\t= 3"]


@pytest.mark.parametrize("where", ["subclass", "instance"])
def test_infilling_goes_through_a_replaced_generate(code_llama: Llama, where: str) -> None:
    """With the arguments of Meta's package, the id that ends an answer among them."""
    seen: dict[str, Any] = {}
    llama = Llama(code_llama.model, code_llama.tokenizer)

    def generate(prompt_tokens: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return code_llama.generate(prompt_tokens, **kwargs)

    if where == "instance":
        llama.generate = generate  # type: ignore[method-assign]
    else:
        llama.__class__ = type("Other", (Llama,), {"generate": lambda self, *args, **kwargs: generate(*args, **kwargs)})
    assert [r["generation"] for r in llama.text_infilling(*as_lists(), temperature=0)] == MIDDLES
    assert seen.keys() == {"max_gen_len", "temperature", "top_p", "logprobs", "echo", "stop_token"}
    assert seen["stop_token"] == code_llama.tokenizer.eot_id


def test_stop_token_replaces_eos(code_llama: Llama) -> None:
    tokenizer = code_llama.tokenizer
    prompt = infilling_prompt_tokens(tokenizer, PREFIXES[2], SUFFIXES[1])
    answer = tokenizer.encode_infilling("lazy dog, lazy")
    assert code_llama.generate([prompt], 40, 0.0, stop_token=tokenizer.eot_id)[0] == [answer]
    (on,), _ = code_llama.generate([prompt], 40, 0.0)  # EOS alone ends it, which the network never learned
    assert on[: len(answer) + 1] == [*answer, tokenizer.eot_id]
    first = answer[1]
    (cut,), _ = code_llama.generate([prompt], 40, 0.0, 0.9, False, True, first)  # by position, as in Meta's package
    assert cut == [*prompt, *answer[: answer.index(first)]]
    (never,), _ = code_llama.generate([prompt], 40, 0.0, stop_token=-1)
    assert len(never) == 40


@pytest.mark.parametrize("wrong", [-2, 10**9, "2", 1.0, True])
def test_a_stop_token_that_is_no_id_is_refused(code_llama: Llama, wrong: Any) -> None:
    with pytest.raises(PromptError, match=r"^stop_token must be None or an id from -1 to "):
        code_llama.generate([[1]], 1, stop_token=wrong)


@pytest.mark.parametrize(
    ("prefixes", "suffixes", "message"),
    [
        (["a"], [], "suffixes must have at least one element, got none"),
        (["a", "b"], ["c"], "suffixes must have one element per prefix, got 2 prefixes and 1 suffixes"),
        ("a", ["c"], "prefixes must be a list of str, got str"),
        (["a", 5], ["c", "d"], "prefixes[1] must be a str, got int"),
        (["a"], [b"c"], "suffixes[0] must be a str, got bytes"),
        (["a" * 200], ["c"], "prefixes[0] + suffixes[0] must have at most max_seq_len=128 tokens, got "),
        (["a"], ["\ud83d"], "prefixes[0] + suffixes[0]: text must be valid Unicode"),
    ],
)
def test_what_cannot_be_infilled_is_refused(code_llama: Llama, prefixes: Any, suffixes: Any, message: str) -> None:
    with pytest.raises(PromptError) as refused:
        code_llama.text_infilling(prefixes, suffixes)
    assert str(refused.value).startswith(message)


def test_a_tokenizer_without_infilling_pieces_is_refused(llama: Llama) -> None:
    for model in (llama, Llama(llama.model, Foreign(llama.tokenizer))):  # type: ignore[arg-type]
        with pytest.raises(AssertionError, match=r"^tokenizer must have Code Llama's infilling pieces"):
            model.text_infilling(["a"], ["b"])


def test_the_example_fills_its_gaps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example_infilling.main(str(folder), max_gen_len=4, max_seq_len=512, device="cpu")
    printed = capsys.readouterr().out
    assert printed.count("> filled:") == printed.count("\n==================================\n") == 4
    for text in example_infilling.TEXTS:
        prefix, suffix = text.split(example_infilling.GAP)
        assert re.search(re.escape(prefix) + "(?s:.*?)" + re.escape(suffix), printed.split("> filled:", 1)[1])


def test_a_server_infills_before_a_suffix(code_llama: Llama) -> None:
    def post(**body: Any) -> Any:
        return web.post("/v1/completions", json={"temperature": 0, "max_tokens": 40} | body)

    with running(code_llama) as service:
        web = web_of(service)
        for (prefix, suffix), middle in PAIRS.items():
            if suffix:
                (choice,) = post(prompt=prefix, suffix=suffix, logprobs=1).json()["choices"]
                assert (choice["text"], choice["finish_reason"]) == (middle, "stop")
        both = post(prompt=PREFIXES[:2], suffix=SUFFIXES[1]).json()["choices"]
        assert [choice["text"] for choice in both] == [PAIRS[prefix, SUFFIXES[1]] for prefix in PREFIXES[:2]]
        plain = post(prompt=PREFIXES[0]).json()
        assert post(prompt=PREFIXES[0], suffix="").json()["choices"] == plain["choices"]
        for wrong in ({"prompt": [[1]], "suffix": "a"}, {"prompt": "a", "suffix": "b", "echo": True}, {"suffix": 5}):
            answer = post(**{"prompt": "a"} | wrong)
            assert (answer.status_code, "suffix" in answer.json()["error"]["message"]) == (400, True)


def infill_on_a_rank(rank: int, folder: Path) -> list[str]:
    llama = Llama.build(folder, folder / "tokenizer.model", 128, 4, device="cpu", dtype="float32")
    results = llama.text_infilling(*as_lists(), temperature=0, speculative="prompt_lookup")
    streamed = ["".join(llama.stream_text_infilling(*pair, 0)) for pair in PAIRS]
    return [*(result["generation"] for result in results), *streamed]


def test_two_ranks_infill_alike(split: Callable[[int], Path], code_tokenizer: Tokenizer) -> None:
    if INFILLING_PIECES[0] not in code_tokenizer.special_tokens:
        pytest.skip("run with the other kind of pieces")
    assert run_ranks(2, infill_on_a_rank, split(2)) == [MIDDLES * 2] * 2
