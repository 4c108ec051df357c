"""Answers in a form: whatever the weights, every answer that ends is valid, by jsonschema and Python's own parsers."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from llama import Llama
from llama.engine.constraints import Constraint, Vocabulary, vocabulary_of
from llama.errors import PromptError
from llama.inputs import SamplingParams

jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema, of the extra [test]")
pytest.importorskip("llguidance", reason="needs the package llguidance, of the extra [structured]")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "object": PERSON,
    "optional": PERSON | {"required": []},
    "array": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 9}, "minItems": 1, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
    "enum": {"enum": ["red", 5, None, [1], {"a": 2}]},
    "const": {"const": {"k": "v"}},
    "number": {"type": "number", "minimum": 0.5, "exclusiveMaximum": 2},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,5}$"},
    "date": {"type": "string", "format": "date"},
    "union": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"type": "string", "maxLength": 3}]},
    "reference": {
        "$ref": "#/$defs/pair",
        "$defs": {"pair": {"type": "array", "items": {"$ref": "#/$defs/digit"}, "minItems": 2, "maxItems": 2},
                  "digit": {"type": "integer", "minimum": 0, "maximum": 9}},
    },
    "nested": {
        "type": "object",
        "properties": {"inner": PERSON, "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3}},
        "required": ["inner", "tags"],
        "additionalProperties": False,
    },
    "no-ops": PERSON | {"uniqueItems": False, "x-guidance": {"whitespace_flexible": True}, "deprecated": False},
}  # fmt: skip


def answers(llama: Llama, n: int = 6, **options: Any) -> list[Any]:
    """The completions of a prompt with several seeds at temperature 1 that ended by themselves."""
    done = []
    for seed in range(n):
        (row,) = llama.text_completion(["Give me one"], temperature=1.0, top_p=1.0, seed=seed, **options)
        if row["finish_reason"] == "stop":
            done.append(row["generation"])
    return done


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_that_ends_is_valid(llama: Llama, name: str) -> None:
    schema = SCHEMAS[name]
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}
    found = answers(llama, response_format=form)
    for text in found:
        value = json.loads(text)
        jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
        if not isinstance(value, float):
            assert json.dumps(value, ensure_ascii=False) == text or "\\" in text
    assert found or name in ("nested", "object", "optional", "no-ops")  # random weights may not end within the context


def test_an_object_of_any_kind(llama: Llama) -> None:
    for text in answers(llama, response_format={"type": "json_object"}):
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choices_and_expressions(llama: Llama, temperature: float) -> None:
    choices = ["yes", "no", 'may"be', "naïve", "a b"]
    prompts = ["Well?", "And you?"]
    for row in llama.text_completion(prompts, temperature=temperature, structured_outputs={"choice": choices}):
        assert row["generation"] in choices and row["finish_reason"] == "stop"
    pattern = r"[0-9]{3}/[a-f]{2}"
    for row in llama.text_completion(prompts, temperature=temperature, structured_outputs={"regex": pattern}):
        assert re.fullmatch(pattern, row["generation"])
    grammar = 'start: "<" WORD ">"\nWORD: /[a-z]{1,4}/'
    for row in llama.text_completion(prompts, temperature=temperature, structured_outputs={"grammar": grammar}):
        assert re.fullmatch("<[a-z]{1,4}>", row["generation"])


@pytest.mark.parametrize("speculative", [None, "prompt_lookup"])
def test_chats_and_streams_have_no_space_in_front(llama: Llama, speculative: str | None) -> None:
    dialog: Any = [{"role": "user", "content": "Yes or no?"}]
    options: dict[str, Any] = {"temperature": 0, "structured_outputs": {"choice": ["yes", "no"]}}
    (row,) = llama.chat_completion([dialog], **options)
    assert row["generation"]["content"] in ("yes", "no")
    assert "".join(llama.stream_chat_completion(dialog, **options, speculative=speculative)) in ("yes", "no")


def test_rows_of_a_batch_have_their_own_state_and_others_none(llama: Llama) -> None:
    prompts = ["a", "The fox", "Hi there, you"]
    options: dict[str, Any] = {"temperature": 0, "structured_outputs": {"regex": "[a-z]{5}"}}
    expected = [llama.text_completion([prompt], **options)[0] for prompt in prompts]
    assert llama.text_completion(prompts, **options) == expected
    free = llama.text_completion(prompts, temperature=0)
    assert llama.text_completion(prompts, temperature=0) == free


def test_an_interrupted_constraint_consumes_each_token_once(llama: Llama) -> None:
    n_words = llama.tokenizer.n_words
    form = SamplingParams(0.0, 1.0, 9, False, False, structured_outputs={"regex": "(ab)*"}).form
    assert form is not None
    matcher = vocabulary_of(llama.tokenizer, n_words).matcher(form, leading_space=False, stop_ids=frozenset({2}))
    constraint = Constraint(matcher, 1)
    a, b = (vocabulary_of(llama.tokenizer, n_words)(letter)[0] for letter in "ab")

    class Interrupted:
        def consume_token(self, token: int) -> None:
            matcher.consume_token(token)
            raise KeyboardInterrupt

    constraint._matcher = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        constraint([1, a], torch.zeros(n_words))
    constraint._matcher = matcher
    logits = constraint([1, a], torch.zeros(n_words))
    assert logits[a] < 0 and logits[b] == 0


def test_ids_of_a_text_have_exactly_its_bytes(llama: Llama) -> None:
    vocabulary = vocabulary_of(llama.tokenizer, llama.model.params.vocab_size)
    assert vocabulary is vocabulary_of(llama.tokenizer, llama.model.params.vocab_size)
    for text in ("test", " test", "  two", "naïve 日本🦙", "\u2581x", "<s></s>", "\x00\n", ""):
        ids = vocabulary(text)
        assert b"".join(vocabulary.tokens[token] for token in ids) == text.encode()
    broken = "é".encode()[:1] + b" x"
    assert b"".join(vocabulary.tokens[token] for token in vocabulary(broken)) == broken


def test_no_two_tokens_have_the_same_bytes_and_controls_none(llama: Llama) -> None:
    found = Vocabulary(llama.tokenizer, llama.model.params.vocab_size + 8).tokens
    texts = [data for data in found if data]
    assert len(set(texts)) == len(texts)
    for token in (llama.tokenizer.bos_id, llama.tokenizer.eos_id, 0, *range(len(found) - 8, len(found))):
        assert found[token] == b""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format must be"),
        ({"response_format": {"type": "json_schema"}}, "response_format must be"),
        ({"response_format": "json"}, "response_format must be"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "must have one of json, regex, choice and grammar"),
        ({"structured_outputs": {"choice": []}}, "choice must be a list of texts"),
        ({"structured_outputs": {"json": "{"}}, "json must be a JSON schema"),
        ({"structured_outputs": {"regex": "(["}}, "regex must be one that llguidance supports"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "grammar must be one that llguidance supports"),
        ({"structured_outputs": {"json": {"type": "wrong"}}}, "json_schema must be one that llguidance supports"),
        ({"structured_outputs": {"json": {"not": {"type": "string"}}}}, "json_schema must be one that llguidance"),
        ({"structured_outputs": {"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}, "json_schema must be"),
        ({"structured_outputs": {"regex": "a" * 300_000}}, "must have at most 200000 characters"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos must be False"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "must not both be given"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_or_not_supported_is_refused_before_any_work(
    llama: Llama, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        llama.text_completion(["a"], **options)
