"""Hundreds of random schemas with random weights: every answer that ends is valid, or the schema is refused clearly."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.errors import PromptError
from tests.fuzz.profiles import SEED

jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema, of the extra [test]")
pytest.importorskip("llguidance", reason="needs the package llguidance, of the extra [structured]")

N_SCHEMAS = 200
PATTERNS = ["^[a-z]{1,4}$", "^(yes|no)$", "^[0-9]{2}-[0-9]{2}$", "^x+y?$", "[A-F]{2}"]
FORMATS = ["date", "uuid", "ipv4", "email"]


def random_schema(rng: random.Random, depth: int = 3) -> Any:
    """Objects, arrays, enums, numbers with bounds, texts with patterns, formats and lengths, references, unions."""
    simple = ["integer", "number", "string", "boolean", "null", "enum", "const", "pattern", "format"]
    kind = rng.choice([*simple, *(["object", "array", "tuple", "union", "one of", "all of"] if depth else [])])
    low = rng.randint(-50, 50)

    def inner() -> Any:
        return random_schema(rng, depth - 1)

    makers: dict[str, Any] = {
        "integer": lambda: {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 90)},
        "number": lambda: {"type": "number", "minimum": low, "exclusiveMaximum": low + rng.randint(1, 9)},
        "string": lambda: {"type": "string", "maxLength": rng.randint(0, 6)},
        "boolean": lambda: {"type": "boolean"},
        "null": lambda: {"type": "null"},
        "enum": lambda: {
            "enum": rng.sample(["a", "b c", 1, -2.5, None, True, [1], {"k": "v"}, 'q"'], rng.randint(1, 4))
        },
        "const": lambda: {"const": rng.choice(["x", 0, {"a": [1, 2]}, None])},
        "pattern": lambda: {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 12},
        "format": lambda: {"type": "string", "format": rng.choice(FORMATS)},
        "array": lambda: {
            "type": "array",
            "items": inner(),
            "minItems": rng.randint(0, 1),
            "maxItems": rng.randint(1, 3),
        },
        "tuple": lambda: {"type": "array", "prefixItems": [inner(), inner()], "items": False, "minItems": 2},
        "union": lambda: {"anyOf": [inner(), inner()]},
        "one of": lambda: {"oneOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 9}]},
        "all of": lambda: {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 20}]},
        "object": lambda: random_object(rng, inner),
    }
    return makers[kind]()


def random_object(rng: random.Random, inner: Any) -> Any:
    names = rng.sample(["name", "age", "ünï", "a b", 'q"', "tags"], rng.randint(1, 3))
    schema = {"type": "object", "properties": {name: inner() for name in names}, "additionalProperties": False}
    return schema | {"required": rng.sample(names, rng.randint(0, len(names)))}


@pytest.mark.fuzz
def test_random_schemas(checkpoint: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = Llama.build(checkpoint, tokenizer_path, 256, 6, device="cpu", dtype="float32")
    rng, counts = random.Random(SEED), Counter[str]()
    for i in range(N_SCHEMAS):
        schema = random_schema(rng)
        if rng.random() < 0.2:
            schema = {"$ref": "#/$defs/it", "$defs": {"it": schema}}
        form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
        try:
            rows = llama.text_completion(["Go on"] * 6, 1.0, 1.0, seed=i, response_format=form)
        except PromptError as error:
            counts["schemas refused" if "llguidance supports" in str(error) else "other errors"] += 1
            continue
        for row in rows:
            counts[row["finish_reason"]] += 1
            if row["finish_reason"] == "stop":
                value = json.loads(row["generation"])
                jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
    with capsys.disabled():
        print(f"\nseed {SEED}: {N_SCHEMAS} schemas, {dict(counts)}")
    assert counts["stop"] > 2 * N_SCHEMAS and not counts["other errors"]
