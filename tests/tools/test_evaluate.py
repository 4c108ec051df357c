"""Evaluation: the numbers of the harness's own "hf" model on the same weights, from tasks that are written here."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama, Message
from llama.chat import ChatFormat
from llama.checkpoint.format import read_params
from llama.text.chat_format import CHAT_FORMAT_FILE
from llama.tools import evaluate
from llama.tools.convert import to_hf
from tests.conftest import ROOT, TEXT
from tests.support.processes import clean_environment
from tests.support.ranks import run_ranks
from tests.support.templates import VICUNA
from tests.test_examples import TINY_LLAMA

pytest.importorskip("lm_eval", reason="evaluation needs the extra [eval]")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from llama.tools.harness import LlamaLM

MAX_SEQ_LEN = 64
TASKS = ["letters", "endings", "unconditional", "rolling", "generation"]
WORDS = " ".join(TEXT).split()
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
"""
CHOICES = """
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
# Without a space in front, where transformers' tokenizer drops one that SentencePiece keeps.
UNCONDITIONAL = CHOICES + 'target_delimiter: ""\n'
ROLLING = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
GENERATION = """
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n", "e", "Q:"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def phrase(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def docs(name: str) -> list[dict[str, Any]]:
    """Short and long ones: some texts have to be truncated to the model's length."""
    rng = random.Random(name)
    made = []
    for i in range(12):
        text = "" if name == "unconditional" else phrase(rng, rng.choice([1, 5, 60]))
        endings = [phrase(rng, rng.randint(1, 6)) for _ in range(3)]
        choices = ["A", "B", "C"] if name == "letters" else endings
        made.append({"text": text, "choices": choices, "answer": endings[0] if name == "generation" else i % 3})
    return made


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks and their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    kinds = {
        "letters": CHOICES,
        "endings": CHOICES,
        "unconditional": UNCONDITIONAL,
        "rolling": ROLLING,
        "generation": GENERATION,
    }
    types = {"rolling": "loglikelihood_rolling", "generation": "generate_until"}
    for name, rest in kinds.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs(name)))
        kind = types.get(name, "multiple_choice")
        common = COMMON.format(name=name, data=data, cache=folder / "cache", kind=kind)
        common = common.replace('doc_to_text: "{{text}}"\n', "") if name == "rolling" else common
        (folder / f"{name}.yaml").write_text(common + rest)
    return folder


def outcomes(lm: Any, tasks: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of each task, and the model's answers to each document."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = simple_evaluate(lm, tasks=TASKS, task_manager=manager, bootstrap_iters=0, log_samples=True, **options)
    metrics = {name: {k: v for k, v in of.items() if "," in k} for name, of in results["results"].items()}
    samples = {name: [sample["filtered_resps"] for sample in of] for name, of in results["samples"].items()}
    return metrics, samples


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tasks: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of "hf" on the toy checkpoint, which writes whole characters, unlike a random one: transformers decodes
    others in a way of its own."""
    for package in ("transformers", "accelerate", "safetensors"):
        pytest.importorskip(package, reason=f"the harness's hf model needs {package}")
    folder = tmp_path_factory.mktemp("hf") / "model"
    to_hf(TINY_LLAMA, TINY_LLAMA / "tokenizer.model", folder, quiet=True)
    options = {"dtype": "float32", "device": "cpu", "batch_size": 3, "max_length": MAX_SEQ_LEN}
    return outcomes(get_model("hf")(str(folder), **options), tasks)


def close(value: Any) -> Any:
    """The value with its floats to be compared to 1e-3."""
    if isinstance(value, dict):
        return {name: close(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [close(inner) for inner in value]
    return pytest.approx(value, rel=1e-3) if isinstance(value, float) else value


def listed(value: Any) -> Any:
    """With lists for tuples."""
    return [listed(inner) for inner in value] if isinstance(value, list | tuple) else value


def check(found: tuple[dict[str, Any], dict[str, Any]], expected: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert found[0] == close(expected[0])
    for name in TASKS:
        assert listed(found[1][name]) == close(expected[1][name]), name


def test_every_task_has_hfs_metrics_and_answers(tasks: Path, expected: tuple[dict[str, Any], dict[str, Any]]) -> None:
    flags: dict[str, Any] = {"max_seq_len": MAX_SEQ_LEN, "batch_size": 4, "dtype": "float32", "device": "cpu"}
    found = outcomes(LlamaLM(str(TINY_LLAMA), **flags), tasks)
    check(found, expected)
    flags = [answer[1] for name in TASKS[:3] for doc in found[1][name] for answer in doc]
    assert len(flags) == 108
    texts = [text for (text,) in found[1]["generation"]]
    assert any(texts) and not any("e" in text for text in texts)


def evaluate_on_rank(rank: int, flags: dict[str, Any], tasks: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    lm = LlamaLM(**flags)
    results = outcomes(lm, tasks) if rank == 0 else None
    if rank:
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        simple_evaluate(lm, tasks=TASKS, task_manager=manager, bootstrap_iters=0)
    return results


@pytest.mark.parametrize(("n_ranks", "mp"), [(2, 2), (2, 1)], ids=["MP 2", "2 replicas"])
def test_ranks_have_them_too(
    n_ranks: int,
    mp: int,
    tasks: Path,
    expected: tuple[dict[str, Any], dict[str, Any]],
    write_checkpoint: Callable[..., Path],
) -> None:
    state: dict[str, Any] = torch.load(TINY_LLAMA / "consolidated.00.pth", weights_only=True)
    folder = write_checkpoint(read_params(TINY_LLAMA), state, mp)
    flags = {"ckpt_dir": str(folder), "tokenizer_path": str(TINY_LLAMA / "tokenizer.model")}
    flags |= {"max_seq_len": MAX_SEQ_LEN, "batch_size": 4, "model_parallel_size": mp, "dtype": "float32"}
    check(run_ranks(n_ranks, evaluate_on_rank, flags, tasks)[0], expected)


def instance(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def test_a_continuation_of_greedy_tokens_is_said_to_be_greedy(llama: Llama) -> None:
    lm = LlamaLM(llama=llama)
    context = "The quick brown"
    ids = llama.tokenizer.encode(context, bos=True, eos=False)
    greedy = llama.generate([ids], 5, temperature=0)[0][0]
    other = [*greedy[:-1], (greedy[-1] + 1) % llama.tokenizer.n_words]
    (right, is_greedy), (wrong, is_wrong_greedy) = lm._loglikelihood_tokens(
        [(None, ids, greedy), (None, ids, other)], disable_tqdm=True
    )
    assert (is_greedy, is_wrong_greedy) == (True, False)
    for tokens, found in ((greedy, right), (other, wrong)):
        assert found == pytest.approx(sum(llama.score_tokens([[*ids, *tokens]])[0][-len(tokens) :]), rel=1e-4)


DIALOGS: list[list[Message]] = [
    [{"role": "user", "content": " Hi "}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": " I. "},
        {"role": "user", "content": "Why?\n"},
    ],
]


@pytest.mark.parametrize("dialog", DIALOGS, ids=len)
def test_the_chat_template_gives_the_ids_that_chat_completion_runs(llama: Llama, dialog: list[Message]) -> None:
    lm = LlamaLM(llama=llama)
    assert lm.tok_encode(lm.apply_chat_template(dialog)) == ChatFormat().encode(dialog, llama.tokenizer)
    begun: Message = {"role": "assistant", "content": "It is "}
    continued = lm.apply_chat_template([*dialog, begun], add_generation_prompt=False)
    assert continued == lm.apply_chat_template(dialog) + " It is"


def test_a_checkpoint_of_another_chat_format_gets_chats_in_it(
    checkpoint: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (folder / CHAT_FORMAT_FILE).write_text(json.dumps({"chat_template": VICUNA}))
    lm = LlamaLM(str(folder), str(tokenizer_path), 64, 1, device="cpu", dtype="float32")
    dialog: list[Message] = [{"role": "user", "content": "Hi"}]
    rendered = lm.apply_chat_template(dialog)
    assert (lm.chat_template(True), rendered) == (VICUNA, "<s>A chat. USER: Hi ASSISTANT:")
    assert lm.tok_encode(rendered) == lm.llama.chat_format.encode(dialog, lm.llama.tokenizer)
    (answer,) = lm.llama.chat_completion([dialog], temperature=0, max_gen_len=8)
    request = instance("generate_until", rendered, {"until": [], "max_gen_toks": 8})
    assert lm.generate_until([request], disable_tqdm=True) == [answer["generation"]["content"]]


def test_chats_are_answered_as_by_chat_completion(llama: Llama) -> None:
    lm = LlamaLM(llama=llama)
    requests = [
        instance("generate_until", lm.apply_chat_template(dialog), {"until": [], "max_gen_toks": 8})
        for dialog in DIALOGS[:2]
    ]
    answers = llama.chat_completion(DIALOGS[:2], temperature=0, max_gen_len=8)
    assert lm.generate_until(requests, disable_tqdm=True) == [answer["generation"]["content"] for answer in answers]


def test_a_sampled_generation_has_its_own_seed(llama: Llama) -> None:
    kwargs = {"until": ["zzz"], "max_gen_toks": 12, "temperature": 1.0, "do_sample": True, "top_p": 0.95}
    requests = [instance("generate_until", "The quick", kwargs) for _ in range(6)]
    first, again = (LlamaLM(llama=llama, seed=3).generate_until(requests, disable_tqdm=True) for _ in range(2))
    assert first == again and len(set(first)) > 1
    assert LlamaLM(llama=llama, seed=4).generate_until(requests, disable_tqdm=True) != first


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4, "max_gen_toks": 4}, "num_beams must be 1, got 4"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 40, "max_gen_toks": 4}, "'top_k' is not supported, got 40"),
        ({"max_gen_toks": 64}, "max_seq_len must be more than the 64 tokens"),
        ({}, "max_seq_len must be more than the 256 tokens"),
    ],
)
def test_what_a_task_asks_for_in_vain_is_an_error(llama: Llama, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LlamaLM(llama=llama).generate_until([instance("generate_until", "a", kwargs)], disable_tqdm=True)


def test_a_cache_answers_the_second_time(
    llama: Llama, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = outcomes(LlamaLM(llama=llama), tasks, use_cache=str(tmp_path / "cache"))
    lm = LlamaLM(llama=llama)
    monkeypatch.setattr(lm, "_share", None)
    again = outcomes(lm, tasks, use_cache=str(tmp_path / "cache"))
    assert listed(again) == listed(first)


# ---- the command ----


def test_the_command_prints_the_table_and_writes_the_results(
    tasks: Path, tmp_path: Path, checkpoint: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, Any] = {"ckpt_dir": str(checkpoint), "tokenizer_path": str(tokenizer_path), "max_seq_len": 64}
    output = tmp_path / "results.json"
    evaluate.main("letters, rolling", include_path=str(tasks), output=str(output), limit=4, dtype="float32", **flags)
    printed = capsys.readouterr().out
    assert re.search(r"\|letters\s*\|.*\|acc\s*\|", printed) and "word_perplexity" in printed
    results = json.loads(output.read_text())
    assert results["results"]["letters"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    assert results["config"]["model_dtype"] == "torch.float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": "no_such_task"}, "--tasks must be names of tasks .*, got no_such_task"),
        ({"tasks": ","}, "--tasks must have at least one name"),
        ({"include_path": "/nowhere"}, "--include_path must be a folder of tasks"),
        ({"output": "/nowhere/results.json"}, "--output must be a path in a folder that exists"),
        ({"gen_kwargs": "num_beams=4"}, "--gen_kwargs .*: the generation argument num_beams must be 1, got 4"),
        ({"gen_kwargs": "do_sample=True,temperature=-1"}, "--gen_kwargs .*: temperature must be 0 .*, got -1"),
        ({"gen_kwargs": "do_sample=True,top_k=40"}, "--gen_kwargs .*: .* 'top_k' is not supported, got 40"),
        ({"gen_kwargs": "max_gen_toks=4096"}, "--gen_kwargs .*: max_seq_len must be more than the 4096 tokens"),
        ({"gen_kwargs": "max_gen_toks=few"}, "--gen_kwargs .*: .* max_gen_toks must be a number, got 'few'"),
        ({"gen_kwargs": "until=5"}, "--gen_kwargs .*: stop must be a list of non-empty strings"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(
    change: dict[str, str], message: str, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Llama, "build", None)
    with pytest.raises(ValueError, match=message):
        evaluate.main(**{"tasks": "letters", "include_path": str(tasks)} | change)


def test_lm_eval_takes_the_model_by_its_name(tasks: Path, checkpoint: Path, tokenizer_path: Path) -> None:
    code = "import llama.tools.harness; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    model = f"ckpt_dir={checkpoint},tokenizer_path={tokenizer_path},max_seq_len=64,dtype=float32"
    options = ["--model", "llama-meta", "--model_args", model, "--tasks", "letters", "--include_path", str(tasks)]
    ended = subprocess.run(
        [sys.executable, "-c", code, *options],
        capture_output=True,
        text=True,
        env=clean_environment(),
        cwd=ROOT,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "|letters|" in ended.stdout
