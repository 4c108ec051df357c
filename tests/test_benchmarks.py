"""The benchmark runs and says what it should; how fast anything is, is never asserted."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from benchmarks import bench, report, rounds, serving, speculative
from benchmarks.job import Job, parse
from benchmarks.ours import Ours
from benchmarks.published import PublishedWay
from benchmarks.rounds import EngineProcess, Plan
from benchmarks.scripts import SCRIPTS, Script, repeated_ngrams
from benchmarks.shapes import SHAPES, bytes_per_decode_step
from benchmarks.worker import LOAD, figure, turns
from llama import Llama, ModelArgs
from llama.checkpoint.reading import read_shard

OURS = {
    *("load", "first_token", "prefill_16", "prefill_128", "prefill_512", "decode_1", "decode_4", "ragged_first_token"),
    *("peak_memory", "memory_planned", "memory_over_plan_ratio"),
    *("load_weights", "sampling_1", "share_of_step_sampling_4", "share_of_matmul_prefill_128"),
    "first_token_over_reading_and_packing_ratio",
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The JSON lines of one round on the tiny shape, one peer asked for that is not there."""
    out = tmp_path_factory.mktemp("benchmark") / "lines.json"
    bench.main("tiny", repeats=1, threads=1, batches=(1, 4), decode_steps=4, published_rounds=0, json=str(out))
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_figure_is_there_and_positive(lines: list[dict[str, Any]]) -> None:
    assert {line["figure"] for line in lines if line["engine"] == "ours"} >= OURS
    assert {line["figure"] for line in lines if line["engine"] == "ours_max_batch_1"} >= {
        "decode_1",
        "share_of_bandwidth_decode_1",
    }
    assert {line["figure"] for line in lines if line["engine"] == "machine"} == {
        *("read_bandwidth", "read_file", "matmul_rate")
    }
    assert all(line["min"] > 0 for line in lines)


def test_every_line_names_shape_and_machine(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        assert line["shape"] == "tiny" and line["dtype"] == "bfloat16" and line["threads"] == 1
        assert line["machine"]["cpu"] and line["machine"]["torch"] == torch.__version__
        assert line["versions"]["ours"]


def test_ratios_say_how_many_times_as_good_ours_is() -> None:
    rounds = [
        {"ours": {"decode_1": 4.0, "load": 2.0}, "hf": {"decode_1": 2.0, "load": 3.0}},
        {"ours": {"decode_1": 3.0, "load": 2.0}, "hf": {"decode_1": 1.0, "load": 1.0}},
        {"ours": {"decode_1": 3.0, "load": 2.0}},
    ]
    ratios = {line.figure: line.values for line in report.ratio_lines(rounds)}
    assert ratios == {"decode_1": [2.0, 3.0], "load": [1.5, 0.5]}
    assert "ours/hf" in report.ratio_table(report.ratio_lines(rounds))


def test_int8_is_compared_with_quantized_engines_and_with_our_own_default() -> None:
    rounds = [{name: {"decode_1": 1.0} for name in ("ours", "ours_int8", "hf", "llama_cpp_q8_0", "machine")}]
    assert [line.engine for line in report.ratio_lines(rounds)] == [
        *("ours_int8/ours", "ours/hf", "ours/llama_cpp_q8_0", "ours_int8/llama_cpp_q8_0", "ours/machine")
    ]


def test_a_peer_that_is_not_installed_is_left_out_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    installed = bench._installed("llama_cpp", "llama_cpp=/usr/bin/env", "cuda")
    assert installed == {} and "llama_cpp" in capsys.readouterr().err


def test_each_engine_is_the_first_in_some_round(job: Job, llama: Llama) -> None:
    plan = Plan(llama.model.params, job, {}, repeats=2, published_rounds=1, one_at_a_time=False)
    engines_ = ["ours", "hf", "published"]
    assert [plan.groups(engines_, i) for i in range(3)] == [[engines_], [["hf", "ours"]], [["ours", "hf"]]]
    alone = replace(plan, one_at_a_time=True)
    assert alone.groups(engines_, 1) == [["hf"], ["ours"]]


class _FakeProcess:
    """Says the turns that it took; hf fails at decoding."""

    running: ClassVar[list[str]] = []
    taken: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, engine: str, python: str, job: Job, job_file: Path) -> None:
        self.engine = engine

    def __enter__(self) -> _FakeProcess:
        self.running.append(self.engine)
        return self

    def __exit__(self, *_: object) -> None:
        self.running.remove(self.engine)

    def take_turn(self, turn: str, on_figure: rounds.OnFigure) -> rounds.Figures:
        self.taken.append((turn, self.engine))
        if (turn, self.engine) == ("decode_1", "hf"):
            raise RuntimeError("exit status 1: no room")
        return {turn: float(len(self.running))}


def test_a_peer_that_fails_is_left_out_from_there_on(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounds, "EngineProcess", _FakeProcess)
    pythons = {"ours": sys.executable, "hf": sys.executable}
    found = rounds._take_turns(["ours", "hf"], pythons, job, Path("job.json"), "round 1/1")
    assert found == {
        "ours": {LOAD: 1.0, "prefill_4": 2.0, "decode_1": 2.0, "decode_2": 2.0, "ragged_first_token": 2.0, "end": 2.0},
        "hf": {LOAD: 2.0, "prefill_4": 2.0},
    }
    assert _FakeProcess.taken[:6] == [(turn, who) for turn in turns(job)[:3] for who in ("ours", "hf")]
    assert (
        pythons.keys() == {"ours"} and "hf: left out, it failed with exit status 1: no room" in capsys.readouterr().err
    )
    assert not _FakeProcess.running


def test_a_process_that_ends_in_its_turn_leaves_its_last_words(job: Job, tmp_path: Path) -> None:
    job.write(tmp_path / "job.json")
    there = replace(job, folder=str(tmp_path))
    ends = pytest.raises(RuntimeError, match=r"exit status 1: .*KeyError: 'nonsense'")
    with EngineProcess("nonsense", sys.executable, there, tmp_path / "job.json") as process, ends:
        process.take_turn(LOAD, lambda *_: None)


def test_unknown_peers_and_shapes_are_errors() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        bench._installed("nonsense", "", "cpu")
    with pytest.raises(ValueError, match=r"shape must be one of tiny, 110m, 200m, 1b, 7b, 13b, got '2b'"):
        bench.main("2b")


def test_lines_of_other_programs_are_no_figures() -> None:
    assert parse("loading model ...") is None and parse("17") is None
    assert parse('{"figure": "load", "value": 1.5}') == ("load", 1.5)


def test_a_decode_step_reads_all_but_the_embedding(job: Job) -> None:
    args = ModelArgs(**SHAPES["1b"])
    sized = Job(**asdict(job) | {"dtype": "bfloat16", "decode_prompt": 128, "decode_steps": 32})
    assert bytes_per_decode_step(args, sized) == 2 * (1_034_512_384 + 2 * 22 * 4 * 64 * 144)


@pytest.fixture(scope="module")
def job(checkpoint: Path, tokenizer_path: Path, llama: Llama) -> Job:
    """The tests' own small checkpoint, in float32, with sizes that its cache has room for."""
    args = llama.model.params
    return Job(
        shape="tests",
        ckpt_dir=str(checkpoint),
        tokenizer_path=str(tokenizer_path),
        folder=str(checkpoint),
        dim=args.dim,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        n_kv_heads=args.kv_heads,
        hidden_dim=args.hidden_dim,
        vocab_size=args.vocab_size,
        norm_eps=args.norm_eps,
        rope_theta=args.rope_theta,
        dtype="float32",
        prefill_lengths=(4,),
        decode_batches=(1, 2),
        decode_prompt=5,
        decode_steps=3,
        ragged_lengths=(3, 5, 9),
    )


def test_the_published_way_computes_the_same_tokens(job: Job, llama: Llama) -> None:
    published = PublishedWay(read_shard(Path(job.ckpt_dir) / "consolidated.00.pth"), job)
    chosen: list[list[int]] = []
    forward = published.forward

    def record(tokens: torch.Tensor, start: int) -> torch.Tensor:
        logits = forward(tokens, start)
        chosen.append(logits[:, -1].argmax(-1).tolist())
        return logits

    published.forward = record  # type: ignore[method-assign]
    prompts = job.prompts([3, 5, 9])
    ticks = []
    published.run(prompts, 2, lambda: ticks.append(len(chosen)))
    firsts = [chosen[len(prompt) - 3][i] for i, prompt in enumerate(prompts)]
    assert [[first] for first in firsts] == llama.generate(prompts, 1, temperature=0)[0]
    assert ticks == [7, 8]  # passes until all three have a token: one over 3 positions, six over one; then one more


def test_our_engine_ticks_once_a_token_of_all_rows(job: Job, llama: Llama) -> None:
    ours = Ours(llama, (1, 2))
    ticks: list[None] = []
    ours.run(job.prompts([3, 9]), 5, lambda: ticks.append(None))
    assert len(ticks) == 5
    assert turns(job) == ["load", "prefill_4", "decode_1", "decode_2", "ragged_first_token", "end"]
    assert all((figure(ours, name, job) or 0) > 0 for name in turns(job)[1:-1])


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[bench]'")
    rounds = [{"ours": {"decode_1": 4.0}, "ctranslate2": {"decode_1": 2.0}}]
    report.plot(report.engine_lines(rounds), {"ctranslate2": "ctranslate2 4, int8"}, "title", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_repeated_ngrams_are_those_that_occurred_before() -> None:
    assert repeated_ngrams(Script([1, 2, 3], [1, 2, 3]), size=2) == 2 / 3  # (3, 1) is new
    assert repeated_ngrams(Script([5], [6, 6, 6]), size=2) == 1 / 3  # the second (6, 6)


@pytest.mark.parametrize(("kind", "least", "most"), [("code edit", 0.5, 0.9), ("without repetition", 0.0, 0.05)])
def test_scripts_repeat_as_much_as_their_kind(kind: str, least: float, most: float) -> None:
    for seed in range(5):
        script = SCRIPTS[kind](random.Random(seed), 32000, 200, 128)
        assert (len(script.prompt), len(script.output)) == (200, 128)
        assert least <= repeated_ngrams(script) <= most
        assert script == SCRIPTS[kind](random.Random(seed), 32000, 200, 128)


@pytest.mark.parametrize("way", [None, "prompt_lookup"])
def test_a_scripted_network_writes_the_script(way: str | None, llama: Llama, job: Job) -> None:
    draw = random.Random(0)
    prompt = [draw.randrange(3, job.vocab_size) for _ in range(9)]
    output = [*prompt, *(draw.randrange(3, job.vocab_size) for _ in range(3))]
    hook, times = speculative.Scripted(llama.model), speculative.PassTimes(llama.model)
    try:
        hook.start(Script(prompt, output))
        run = speculative.decode(llama, times, prompt, len(output), way)
    finally:
        hook.remove()
        times.remove()
    assert run.tokens == output and run.rate > 0
    assert run.per_pass >= 1 if way else run.per_pass == 1
    assert llama.generate([prompt], len(output), temperature=0)[0] != [output]


def test_a_round_of_serving_answers_every_request(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastapi", reason="needs the extra [serve]")
    serving.main("tiny", n_requests=5, clients=(2,), batch=2, output_median=4, repeats=1, threads=1)
    *_, last = capsys.readouterr().out.splitlines()
    rounds = json.loads(last)["rounds"]
    assert rounds.keys() == {"kept full", "8 Python threads", "ours, 2 clients"}
    ((expected, _),) = rounds["kept full"]
    assert all(0 < tokens <= expected + 5 for ((tokens, _),) in rounds.values())
