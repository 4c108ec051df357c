"""The benchmark runs and says what it should; how fast anything is, is never asserted."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench, report, serving, speculative
from benchmarks.gpt_fast import Network
from benchmarks.networks import SHAPES, bytes_per_decode_step, make_job
from benchmarks.peers import ENGINES, Ours, greedy_steps
from benchmarks.speculative import KINDS, Script, Scripted, repeated_ngrams, write_script
from benchmarks.worker import LOAD, Figures, Job, engine_process, figure, left_out_if_it_fails, prepare
from llama import Llama, ModelArgs
from llama.checkpoint.format import tensor_shapes
from llama.layers.kernels import can_quantize


@pytest.fixture(scope="module")
def job(checkpoint: Path, tokenizer_path: Path, llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The tests' own small checkpoint, in float32, with sizes that its cache has room for."""
    args = llama.model.params
    return Job(
        ckpt_dir=str(checkpoint),
        tokenizer_path=str(tokenizer_path),
        folder=str(tmp_path_factory.mktemp("job")),
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
    )


def test_every_figure_is_there_and_names_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BUFFER_BYTES", 2**20)
    out = tmp_path / "lines.json"
    sizes = {"batches": (1, 4), "prefills": 16, "decode_steps": 4}
    bench.main("tiny", peers="ours_max_batch_1", repeats=1, threads=1, json=str(out), **sizes)  # type: ignore[arg-type]
    figures: dict[str, set[str]] = {}
    for read in map(json.loads, out.read_text().splitlines()):
        figures.setdefault(read["engine"], set()).add(read["figure"])
        assert min(read["values"]) > 0
        assert read["shape"] == "tiny" and read["dtype"] == "bfloat16" and read["threads"] == 1
        assert read["machine"]["cpu"] and read["versions"]["ours"].startswith("torch ")
    assert figures["ours"] == {"load", "first_token", "prefill_16", "decode_1", "decode_4", "peak_memory"}
    assert figures["ours_max_batch_1"] == figures["ours"] - {"decode_4"}
    assert figures["limit"] == figures["ours/limit"] == {"decode_1"}


def test_ratios_say_how_many_times_as_good_ours_is() -> None:
    rounds = [
        {"ours": {"decode_1": 4.0, "load": 2.0}, "hf": {"decode_1": 2.0, "load": 3.0}},
        {"ours": {"decode_1": 3.0, "load": 2.0}, "hf": {"decode_1": 1.0, "load": 1.0}},
        {"ours": {"decode_1": 3.0, "load": 2.0}},
    ]
    ratios = {line.figure: line.values for line in report.ratio_lines(rounds)}
    assert ratios == {"decode_1": [2.0, 3.0], "load": [1.5, 0.5]}
    assert "ours/hf" in report.page(report.engine_lines(rounds), report.ratio_lines(rounds))


def test_builds_are_compared_with_the_default_one_and_with_the_same_form_of_weights() -> None:
    names = ("ours", "ours_int8", "hf", "llama_cpp_q8_0", "limit", "limit_int8")
    rounds = [{name: {"decode_1": 1.0} for name in names}]
    assert [line.engine for line in report.ratio_lines(rounds)] == [
        *("ours_int8/ours", "ours/hf", "ours_int8/llama_cpp_q8_0"),
        *("ours/limit", "ours_int8/limit_int8"),
    ]


def test_peers_and_shapes_that_cannot_be_run_are_errors() -> None:
    for wrong, message in (
        ({"peers": "llama_cpp", "device": "cuda"}, "peers must be of ours, .*, gpt_fast, hf, got llama_cpp"),
        ({"peers": "nonsense"}, "nonsense"),
        ({"shape": "2b"}, "shape must be one of tiny, 110m, 200m, 1b, 7b, 13b, 70b, got '2b'"),
        (
            {"shape": "70b", "peers": "gpt_fast"},
            "builds of this library at shape 70b, which is in int8, got .'gpt_fast'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            bench.main(**{"shape": "tiny"} | wrong)  # type: ignore[arg-type]


def test_a_peer_that_is_not_installed_is_left_out_with_a_line(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    pythons = {"llama_cpp": "no-such-python"}
    with left_out_if_it_fails("llama_cpp", ENGINES["llama_cpp"].install, pythons):
        prepare("llama_cpp", pythons["llama_cpp"], job)
    assert not pythons
    assert "pip install -c constraints.txt llama-cpp-python torch gguf" in capsys.readouterr().err


def test_each_engine_is_the_first_in_some_round() -> None:
    names = ["ours", "hf", "openvino"]
    rounds = [report.in_turn(names, i) for i in range(3)]
    assert {first for first, *_ in rounds} == set(names)
    assert all(sorted(order) == sorted(names) for order in rounds)


def test_a_peer_that_fails_is_left_out_from_there_on(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running: list[str] = []

    @contextmanager
    def fake_process(engine: str, python: str, job: Job) -> Iterator[Callable[[str], Figures]]:
        """Counts the engines that are there; hf fails at decoding."""

        def take_turn(turn: str) -> Figures:
            if (turn, engine) == ("decode_1", "hf"):
                raise RuntimeError("exit status 1: no room")
            return {turn if "_" in turn else "load": float(len(running))}

        running.append(engine)
        yield take_turn
        running.remove(engine)

    monkeypatch.setattr(bench, "engine_process", fake_process)
    pythons = {"ours": sys.executable, "hf": sys.executable}
    found = bench._take_turns(["ours", "hf"], pythons, job)
    assert found["hf"] == {"load": 2.0, "prefill_4": 2.0}
    assert found["ours"].keys() == {"load", "prefill_4", "decode_1", "decode_2"}
    assert pythons.keys() == {"ours"} and not running
    assert "failed with exit status 1: no room" in capsys.readouterr().err


def test_a_process_that_ends_in_its_turn_leaves_its_last_words(job: Job) -> None:
    ends = pytest.raises(RuntimeError, match=r"exit status 1: .*KeyError: 'nonsense'")
    with engine_process("nonsense", sys.executable, job) as take_turn, ends:
        take_turn(LOAD)


@pytest.mark.parametrize("shape", ["tiny", "1b"])
def test_a_decode_step_reads_all_but_the_embedding(shape: str, job: Job) -> None:
    args = ModelArgs(**SHAPES[shape])
    names = ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size")
    sized = replace(job, n_kv_heads=args.kv_heads, dtype="bfloat16", **{name: getattr(args, name) for name in names})
    sizes = {name: size[0] * (size[1] if len(size) > 1 else 1) for name, size in tensor_shapes(args, 1).items()}
    cached = 2 * args.n_layers * args.kv_heads * args.head_dim * (job.decode_prompt + job.decode_steps / 2)
    read = sum(sizes.values()) - sizes["tok_embeddings.weight"]
    assert bytes_per_decode_step(sized) == 2 * (read + cached)
    assert bytes_per_decode_step(sized, "int8") == read + 2 * cached


def test_a_quantized_shape_is_written_with_one_layer_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_quantize(torch.device("cpu")):
        pytest.skip("needs a processor with int8 products")
    monkeypatch.setitem(SHAPES, "quantized", {**SHAPES["tiny"], "n_layers": 3, "quantize": "int8"})
    sizes = {"prefill_lengths": (4,), "decode_batches": (1,), "decode_prompt": 5, "decode_steps": 3}
    plain, quantized = (make_job(shape, tmp_path / shape, **sizes) for shape in ("tiny", "quantized"))
    files = [next(Path(job.ckpt_dir).glob("*.pth")).stat().st_size for job in (plain, quantized)]
    assert files[1] < 0.75 * files[0]
    assert bytes_per_decode_step(quantized) == bytes_per_decode_step(quantized, "int8")
    ours = Ours(quantized, "")
    assert len({layer.attention.wq.weight.data_ptr() for layer in ours.llama.model.layers}) == 1
    assert figure(ours, "decode_1", quantized)["decode_1"] > 0


def test_gpt_fasts_network_generates_what_ours_does(job: Job, llama: Llama) -> None:
    prompts, n_tokens = job.prompts(2, 5), 4
    network = Network(job, 2)
    tokens, positions, chosen = torch.tensor(prompts), torch.arange(5), []
    with torch.inference_mode():
        for _ in range(n_tokens):
            tokens = network(tokens, positions)
            positions = positions[-1:] + 1
            chosen.append(tokens)
    ours = [[result.token for result in greedy_steps(llama, [prompt], [n_tokens])] for prompt in prompts]
    assert torch.cat(chosen, 1).tolist() == ours


def test_our_engine_ticks_once_a_token_of_all_rows(job: Job) -> None:
    ours = Ours(job, "max_batch_1")
    assert ours.batches == (1,) and figure(ours, "decode_2", job) == {}
    ours = Ours(job, "")
    ticks: list[None] = []
    ours.run(job.prompts(2, 3), 5, lambda: ticks.append(None))
    assert len(ticks) == 5
    assert all(figure(ours, name, job)[name] > 0 for name in job.turns[1:-1])


def test_the_plot_is_a_picture_that_stays_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[bench]'")
    context = {"shape": "1b", "dtype": "bfloat16", "machine": {"cpu": "a processor"}}
    engines = ["ours", "hf", "ours_int8", "limit", "limit_int8"]
    rounds = [{engine: {"decode_1": n, "load": 1.0} for engine in engines} for n in (4.0, 5.0)]
    for name in ("a.svg", "b.svg"):
        report.plot(report.json_lines(report.engine_lines(rounds), context), tmp_path / name)
    picture = (tmp_path / "a.svg").read_text()
    assert picture == (tmp_path / "b.svg").read_text()
    assert all(f">{name}<" in picture for name in ("ours", "hf", "ours_int8", "1b, a processor"))


def test_repeated_ngrams_are_those_that_occurred_before() -> None:
    assert repeated_ngrams(Script([1, 2, 3], [1, 2, 3]), size=2) == 2 / 3  # (3, 1) is new
    assert repeated_ngrams(Script([5], [6, 6, 6]), size=2) == 1 / 3  # the second (6, 6)


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ("code edit", 0.5, 0.9),
        ("dialog", 0.1, 0.9),
        ("quoting summary", 0.1, 0.9),
        ("list after examples", 0.02, 0.5),
        ("without repetition", 0.0, 0.05),
    ],
)
def test_scripts_repeat_as_much_as_their_kind(kind: str, least: float, most: float) -> None:
    for seed in range(5):
        script = write_script(kind, seed, 32000, 200, 128)
        assert (len(script.prompt), len(script.output)) == (200, 128)
        assert least <= repeated_ngrams(script) <= most
        assert script == write_script(kind, seed, 32000, 200, 128)
    assert kind in KINDS


@pytest.mark.parametrize("way", [None, "prompt_lookup"])
def test_a_scripted_network_writes_the_script(way: str | None, llama: Llama, job: Job) -> None:
    draw = random.Random(0)
    prompt = [draw.randrange(3, job.vocab_size) for _ in range(9)]
    output = [*prompt, *(draw.randrange(3, job.vocab_size) for _ in range(3))]
    hook = Scripted(llama.model)
    try:
        hook.start(Script(prompt, output))
        run = speculative.decode(llama, prompt, len(output), way)
    finally:
        hook.remove()
    assert run.tokens == output and run.rate > 0
    assert run.per_pass >= 1 if way else run.per_pass == 1
    assert llama.generate([prompt], len(output), temperature=0)[0] != [output]


def test_a_round_of_serving_answers_every_request(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("starlette", reason="needs the extra [serve]")
    options = {"common": 20, "busy_loops": 1, "batch": 2, "repeats": 1, "threads": 1}
    serving.main("tiny", n_requests=5, clients=(2,), output_median=4, **options)  # type: ignore[arg-type]
    *_, last = capsys.readouterr().out.splitlines()
    (figures,) = json.loads(last)["rounds"]
    ways = {
        "kept full",
        "calls of 2",
        "calls of 2, rows stay",
        "8 Python threads",
        "prefixes reused",
        "ours, 2 clients",
    }
    assert figures.keys() == ways
    assert all(0 < way["tokens"] <= figures["kept full"]["tokens"] + 5 for way in figures.values())
    assert figures["ours, 2 clients"]["first_token"] > 0
