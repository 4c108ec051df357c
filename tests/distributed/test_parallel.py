"""Several ranks over gloo: what one process gives, all of them give, whatever their number and whoever stops early.

Each `world_N` fixture starts N processes once, has them do everything, and returns what each of them saw.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import destroy_model_parallel
from torch import Tensor

from llama import Llama
from llama.engine import compiled
from llama.engine.compiled import CAN_COMPILE, CompiledStepper
from llama.engine.runner import ModelRunner
from llama.engine.speculative import PassCosts, Speculator
from tests.conftest import ROOT
from tests.support import oracle
from tests.support.ranks import FAULT, run_faulty_ranks, run_ranks
from tests.support.steps import Traced

MAX_SEQ_LEN, MAX_BATCH_SIZE = 48, 4
DEADLINE = 150  # seconds after which ranks that wait for each other are ended, with their stacks printed
PROMPTS = [
    [random.Random(length).randrange(3, 500) for _ in range(length)]
    for length in (7, 1, 30, 12, 3, 22, 47, 48, 9, 2, 5)
]
TOKENS = torch.randint(3, 500, (3, 30), generator=torch.Generator().manual_seed(0))
TEXTS = ["The quick", "", "  naïve café", "日本", "A tiny tokenizer knows", "12"]
DIALOGS: list[Any] = [
    [{"role": "user", "content": "fox?"}],
    [{"role": "user", "content": "a [INST] b"}],
    [{"role": "system", "content": "Be."}, {"role": "user", "content": "dog?"}],
]
Result = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """What a rank needs to build the same model from the same weights, split over some files."""

    folder: Path
    tokenizer_path: Path
    size: int | None  # None: as many as there are processes
    seed: int | None = 1
    dtype: str | None = "float32"
    draft: Path | None = None

    def build(self, **changes: Any) -> Llama:
        chosen = replace(self, **changes)
        return Llama.build(
            chosen.folder,
            chosen.tokenizer_path,
            MAX_SEQ_LEN,
            MAX_BATCH_SIZE,
            chosen.size,
            chosen.seed,
            device="cpu",
            dtype=chosen.dtype,
            draft_ckpt_dir=chosen.draft,
        )


def message(call: Callable[[], object]) -> str:
    """The type and first line of the error that the call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "no error"


def core_calls(llama: Llama) -> Result:
    greedy, logprobs = llama.generate(PROMPTS, 8, temperature=0, logprobs=True)
    return {
        "forward": llama.model.forward(TOKENS, 0),
        "step": llama.model.forward(TOKENS[:, 5:7], torch.tensor([5, 2, 4])),
        "greedy": greedy,
        "greedy logprobs": logprobs,
        "sampled": llama.generate(PROMPTS[:4], 8, temperature=1.0, seed=11)[0],
    }


def every_call(llama: Llama) -> Result:
    """None of them draws from the stream that `build` seeded."""
    return core_calls(llama) | {
        "one": llama.generate(PROMPTS[:1], 8, temperature=1.0, seed=11),
        "text": llama.text_completion(TEXTS[:4], max_gen_len=8, temperature=1.0, echo=True, stop=["e"], seed=12),
        "many texts": llama.text_completion(TEXTS, max_gen_len=4, temperature=0),
        "chat": llama.chat_completion(DIALOGS, max_gen_len=8, temperature=1.0, seed=13),
        "refused": llama.chat_completion(DIALOGS[1:2]),
        "scores": [score["logprobs"] for score in llama.score(TEXTS)],
        "stream": "".join(llama.stream_text_completion("The", temperature=1.0, max_gen_len=9, seed=14)),
    }


def unseeded_calls(llama: Llama) -> list[Any]:
    """Calls of several lengths that all draw from the stream that `build` seeded."""
    return [
        llama.generate(PROMPTS[:1], 9, temperature=1.0),
        llama.generate(PROMPTS[:3], 5, temperature=1.0),
        "".join(llama.stream_text_completion("The", temperature=1.0, max_gen_len=6)),
        llama.generate([PROMPTS[6], PROMPTS[0]], 6, temperature=1.0),  # the first has room for one token
        llama.generate(PROMPTS[:1], 4, temperature=1.0),
    ]


def check(result: Result, one_process: Result) -> None:
    """Tokens and texts are the same; logits and log-probabilities to 1e-4."""
    for name, got in result.items():
        expected = one_process[name]
        if isinstance(got, torch.Tensor):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
        elif name in ("greedy logprobs", "scores"):
            for row, expected_row in zip(got, expected, strict=True):
                assert row == pytest.approx(expected_row, abs=1e-4)
        else:
            assert got == expected, name


@pytest.fixture(scope="module")
def split(checkpoint_in: Callable[[int], Path], tokenizer_path: Path) -> Callable[..., Checkpoint]:
    """The random checkpoint in that many files."""

    def split(files: int, size: int | None = None) -> Checkpoint:
        return Checkpoint(checkpoint_in(files), tokenizer_path, size)

    return split


@pytest.fixture(scope="module")
def one_process(split: Callable[..., Checkpoint]) -> Result:
    return every_call(split(1).build())


@pytest.fixture(scope="module")
def one_process_unseeded(split: Callable[..., Checkpoint]) -> list[Any]:
    return unseeded_calls(split(1).build(seed=5))


# ---- two ranks: MP 2, then two replicas of MP 1 ----


LEAVERS = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 3), (1, 3)]


def early_exits(llama: Llama, rank: int) -> tuple[list[str], list[Any]]:
    """The texts of streams that a rank of LEAVERS leaves after so many pieces, and the rows of a call after each."""
    texts, rows = [], []

    def stream() -> Iterator[str]:
        return llama.stream_text_completion("The", temperature=1.0, max_gen_len=9, seed=14)

    for leaver, pieces in LEAVERS:
        left = stream()
        texts.append("".join(islice(left, pieces if rank == leaver else None)))
        left.close()  # type: ignore[attr-defined]
        rows.append(llama.generate(PROMPTS[:2], 5, temperature=0)[0])
    list(islice(stream(), 1 + rank))  # both leave: the generator is closed when it is forgotten
    return texts, rows


def stream_beside_calls(llama: Llama) -> list[Any]:
    """A stream with a call between its first piece and the others, then with another stream in turn."""
    stream = llama.stream_text_completion("The", temperature=0, max_gen_len=9)
    first = next(stream)
    row = llama.generate(PROMPTS[:2], 5, temperature=0)[0]
    streams = [llama.stream_text_completion(text, temperature=0, max_gen_len=9) for text in ("The", "dog")]
    texts = ["", ""]
    for pieces in zip(*streams, strict=False):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    texts = [text + "".join(rest) for text, rest in zip(texts, streams, strict=True)]
    return [first + "".join(stream), row, texts]


def speculative_calls(llama: Llama) -> tuple[list[Any], list[Any], int]:
    """Calls without and with drafts, which always seem to pay; and how many drafted tokens were accepted."""
    drafts = Speculator(torch.device("cpu"), llama.engine.draft)
    for costs, seconds in ((drafts.costs, 1.0), (drafts.draft_costs, 0.01)):
        for n_positions in (1, 1, 128, 128):  # the first pass of a size does not count
            costs.observe(n_positions, seconds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PassCosts, "observe", lambda *args: None)
        patch.setattr(llama.engine, "_speculator", drafts)
        prompts = [[7, 8, 9] * 8, [11] * 5, [20, 21, 22, 23] * 3, [30], [7, 8] * 9]
        calls: list[Callable[..., Any]] = [
            lambda **way: llama.generate(prompts, 20, temperature=0, **way)[0],
            lambda **way: llama.generate(prompts, 20, temperature=0.2, seed=3, **way)[0],
            lambda **way: "".join(llama.stream_text_completion("fox fox fox", 0.2, max_gen_len=20, seed=3, **way)),
        ]
        plain = [call() for call in calls]
        found = [call(speculative=way) for way in ("prompt_lookup", "draft") for call in calls]
    return plain * 2, found, drafts.counts.accepted


def compiled_calls(exact: Llama, packed: Llama, rank: int) -> tuple[list[Result], list[Tensor]]:
    """Calls whose steps are compiled on both ranks, then on the first one alone; and logits of a packed step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "Compiler", Traced)
        results = []
        for stepper in (CompiledStepper(exact.model), None if rank else CompiledStepper(exact.model)):
            patch.setattr(exact, "stepper", stepper)
            results.append(core_calls(exact))
            assert stepper is None or set(stepper._graphs) == {False, True}
        steps = [ModelRunner(packed.model, stepper) for stepper in (None, CompiledStepper(packed.model))]
        with torch.inference_mode():
            packed.model.forward(TOKENS, 0)
            return results, [step.decode(TOKENS[:, 5:6], [5, 2, 4]).clone() for step in steps]


def two_ranks(rank: int, halves: Checkpoint, whole: Checkpoint) -> Result:
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    result: Result = {
        "errors": [
            message(whole.build),
            message(lambda: halves.build(size=3)),
            message(lambda: halves.build(size=4)),
            message(lambda: halves.build(size=1)),
        ]
    }
    with contextlib.redirect_stdout(io.StringIO()) as out:
        llama = halves.build(seed=5 + rank)
    result["printed"] = out.getvalue()
    result["compiler"] = "torch._dynamo" in sys.modules
    result["backend"] = dist.get_backend()
    result["shapes"] = {name: tuple(tensor.shape) for name, tensor in llama.model.state_dict().items()}
    result["cache"] = tuple(llama.model.layers[0].attention.cache_k.shape)
    result["unseeded"] = unseeded_calls(llama)
    result["calls"] = every_call(llama)
    result["early exits"] = early_exits(llama, rank)
    result["beside"] = stream_beside_calls(llama)
    result["another size"] = message(lambda: whole.build(size=1))
    result["speculative"] = speculative_calls(halves.build(draft=halves.folder))
    second = halves.build()
    result["second build"] = second.generate(PROMPTS, 8, temperature=0)[0]
    result["first build"] = llama.generate(PROMPTS, 8, temperature=0)[0]
    torch.manual_seed(100 + rank)
    before = torch.get_rng_state()
    packed = halves.build(dtype=None, seed=None)
    result["bfloat16"] = packed.model.forward(TOKENS, 0)
    result["default generator kept"] = torch.equal(torch.get_rng_state(), before)
    result["compiled"] = compiled_calls(llama, packed, rank) if CAN_COMPILE else None
    destroy_model_parallel()
    replica = whole.build(size=1, seed=5)
    result["replica calls"] = every_call(replica)
    result["replica unseeded"] = unseeded_calls(replica)
    return result


@pytest.fixture(scope="module")
def world_2(split: Callable[..., Checkpoint]) -> list[Result]:
    return run_ranks(2, two_ranks, split(2), split(1))


def test_mp_2_equals_one_process(world_2: list[Result], one_process: Result) -> None:
    for result in world_2:
        check(result["calls"], one_process)


@pytest.mark.skipif(not CAN_COMPILE, reason="needs torch 2.9")
def test_compiled_steps_at_mp_2_equal_one_process(world_2: list[Result], one_process: Result) -> None:
    for result in world_2:
        exact, (plain, compiled_step) = result["compiled"]
        for calls in exact:
            check(calls, one_process)
        torch.testing.assert_close(compiled_step, plain, atol=0.03 * plain.std().item(), rtol=0)


def test_drafted_tokens_change_nothing_at_mp_2(world_2: list[Result]) -> None:
    for result in world_2:
        plain, found, n_accepted = result["speculative"]
        assert found == plain
        assert n_accepted > 10
    assert world_2[0]["speculative"] == world_2[1]["speculative"]


def test_each_rank_holds_its_part(world_2: list[Result], params: dict[str, Any]) -> None:
    split_dims = {"wo.": 1, "w2.": 1, "tok_embeddings.": 1, "norm": None}
    expected = {}
    for name, shape in oracle.shapes(params).items():
        dim = next((dim for key, dim in split_dims.items() if key in name), 0)
        expected[name] = tuple(size // 2 if axis == dim else size for axis, size in enumerate(shape))
    for result in world_2:
        assert result["shapes"] == expected
        assert result["cache"] == (MAX_BATCH_SIZE, MAX_SEQ_LEN, params["n_kv_heads"] // 2, 8)


def test_all_ranks_emit_the_first_ones_tokens(world_2: list[Result], one_process_unseeded: list[Any]) -> None:
    """Though they were built with different seeds, and torch's default generators stand differently."""
    assert world_2[0]["unseeded"] == world_2[1]["unseeded"] == one_process_unseeded


def test_ranks_that_leave_a_stream_early_stay_in_step(world_2: list[Result], one_process: Result) -> None:
    """Where rank 1 leaves, rank 0 gets the rest; where rank 0 does, rank 1 ends too."""
    whole = one_process["stream"]
    (first, _), (second, _) = (result["early exits"] for result in world_2)
    for (leaver, pieces), mine, theirs in zip(LEAVERS, first, second, strict=True):
        assert whole.startswith(mine) and whole.startswith(theirs)
        assert mine == whole if leaver else theirs == mine
        assert bool(theirs if leaver else mine) == (pieces > 0)
    for result in world_2:
        assert result["early exits"][1] == [[row[:5] for row in one_process["greedy"][:2]]] * len(LEAVERS)


def test_streams_and_calls_go_side_by_side_on_all_ranks(
    world_2: list[Result], split: Callable[..., Checkpoint]
) -> None:
    alone = split(1).build()
    the, dog = (alone.text_completion([text], temperature=0, max_gen_len=9)[0]["generation"] for text in ("The", "dog"))
    row = alone.generate(PROMPTS[:2], 5, temperature=0)[0]
    assert [result["beside"] for result in world_2] == [[the, row, [the, dog]]] * 2


def test_errors_of_sizes_give_both_numbers(world_2: list[Result]) -> None:
    for result in world_2:
        whole, three, four, one = result["errors"]
        assert whole == "AssertionError: Loading a checkpoint for MP=1 but world size is 2"
        assert one == "AssertionError: Loading a checkpoint for MP=2 but world size is 1"
        for got, size in ((three, 3), (four, 4)):
            assert got.startswith("ValueError: the world size must be a multiple of model_parallel_size")
            assert f"got a world size of 2 and model_parallel_size={size}; " in got
        assert result["another size"].startswith("ValueError: model_parallel_size must be 2, ")
        assert "got 1; " in result["another size"]


def test_a_second_build_next_to_the_first(world_2: list[Result], one_process: Result) -> None:
    for result in world_2:
        assert result["second build"] == result["first build"] == one_process["greedy"]


def test_mp_2_in_bfloat16_stays_close(world_2: list[Result], one_process: Result) -> None:
    exact = one_process["forward"]
    for result in world_2:
        difference = (result["bfloat16"] - exact).abs().max()
        assert 0 < difference < 25 * torch.finfo(torch.bfloat16).eps * exact.std()
    assert torch.equal(world_2[0]["bfloat16"], world_2[1]["bfloat16"])


def test_ranks_join_over_gloo_print_nothing_and_without_a_seed_leave_the_default_generator(
    world_2: list[Result],
) -> None:
    """Nor do they import the compiler, which takes each rank longer than loading a model."""
    for result in world_2:
        assert (result["printed"], result["backend"], result["compiler"]) == ("", "gloo", False)
        assert result["default generator kept"]


def test_two_replicas_equal_one_process(world_2: list[Result], one_process: Result) -> None:
    for result in world_2:
        check(result["replica calls"], one_process)


def test_replicas_go_on_in_the_stream_of_one_process(world_2: list[Result], one_process_unseeded: list[Any]) -> None:
    assert world_2[0]["replica unseeded"] == world_2[1]["replica unseeded"] == one_process_unseeded


# ---- four ranks: MP 4, then 2 x 2 ----


def four_ranks(rank: int, quarters: Checkpoint, halves: Checkpoint) -> Result:
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    os.environ["LOCAL_RANK"] = "0"  # as on four machines
    result: Result = {"calls": core_calls(quarters.build())}
    destroy_model_parallel()
    llama = halves.build(size=2, seed=5)
    result["replica calls"] = every_call(llama)
    prefilled = result["prefilled"] = []
    embeddings = llama.model.tok_embeddings
    handle = embeddings.register_forward_pre_hook(
        lambda _, args: prefilled.append(args[0].shape[0]) if args[0].shape[1] > 1 else None
    )
    many = [[5] * (2 + i % 7) for i in range(12)]
    result["many"] = llama.generate(many, 6, temperature=0)
    handle.remove()
    result["fewer than replicas"] = llama.generate(PROMPTS[:1], 8, temperature=0)[0]
    stream = llama.stream_text_completion("The", temperature=1.0, max_gen_len=9, seed=14)
    result["left early"] = list(islice(stream, 1 + rank))
    stream.close()
    result["error"] = message(lambda: llama.generate([[1], []], 5))
    result["after"] = llama.generate(PROMPTS, 8, temperature=0)[0]
    result["sizes"] = [message(lambda size=size: halves.build(size=size)) for size in (3, 4)]
    return result


@pytest.fixture(scope="module")
def world_4(split: Callable[..., Checkpoint]) -> list[Result]:
    return run_ranks(4, four_ranks, split(4), split(2))


def test_mp_4_equals_one_process(world_4: list[Result], one_process: Result) -> None:
    for result in world_4:
        check(result["calls"], one_process)


def test_two_replicas_of_mp_2_return_all_results_on_every_rank(world_4: list[Result], one_process: Result) -> None:
    """Each rank loaded the file of its model-parallel rank, or the logits would be wrong."""
    for result in world_4:
        check(result["replica calls"], one_process)
        assert result["after"] == one_process["greedy"]
        assert result["fewer than replicas"] == one_process["greedy"][:1]


def test_the_replicas_share_the_prompts(world_4: list[Result], split: Callable[..., Checkpoint]) -> None:
    assert [sum(result["prefilled"]) for result in world_4] == [6, 6, 6, 6]
    many = [[5] * (2 + i % 7) for i in range(12)]
    expected = split(1).build().generate(many, 6, temperature=0)
    assert all(result["many"] == expected for result in world_4)


def test_streams_of_replicas_can_be_left_early(world_4: list[Result], one_process: Result) -> None:
    """Each replica's first rank, 0 and 2 here, says for the replica when it is over."""
    assert [len(result["left early"]) for result in world_4] == [1, 1, 3, 3]
    assert all(one_process["stream"].startswith("".join(result["left early"])) for result in world_4)


def test_bad_input_is_an_error_on_every_rank(world_4: list[Result]) -> None:
    for result in world_4:
        assert result["error"].startswith("PromptError: prompt_tokens[1] must have at least one token")
        assert "got a world size of 4 and model_parallel_size=3; " in result["sizes"][0]
        assert "must be 2" in result["sizes"][1] and "got 4; " in result["sizes"][1]


# ---- calls that differ ----


def different_calls(rank: int, halves: Checkpoint) -> Result:
    """Calls that the ranks make differently, each followed by one that they make alike."""
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    llama = halves.build()
    odd = rank == 1
    greedy = {"temperature": 0, "max_gen_len": 4}

    def generate(prompts: Any = ([1, 2],), n: int = 4, **options: Any) -> Callable[[], object]:
        return lambda: llama.generate(prompts, n, **options)

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "a stream": (
            lambda: llama.text_completion(["The"], **greedy),
            lambda: next(llama.stream_text_completion("The", **greedy)),
        ),
        "another kind": (generate(), lambda: llama.score_tokens([[1, 2]])),
        "other prompts": (generate(), generate([[1, 3]])),
        "more prompts": (generate(), generate([[1, 2]] * 2)),
        "another length": (generate(), generate(n=5)),
        "another temperature": (generate(), generate(temperature=0)),
        "another seed": (generate(seed=1), generate(seed=2)),
        "logprobs": (generate(), generate(logprobs=True)),
        "another stop token": (generate(stop_token=3), generate(stop_token=4)),
        "a mistake": (generate(), generate(n=-4)),
        "a mistake of both": (generate(n=-4),) * 2,
        "another thread": (lambda: in_a_thread(generate()),) * 2,
    }
    result: Result = {}
    for name, calls in pairs.items():
        result[name] = message(calls[odd]), llama.generate(PROMPTS[:2], 5, temperature=0)[0]
    handle = llama.model.layers[1].register_forward_hook(fail_in_a_hook)
    error = message(lambda: llama.generate([[1]], 4))
    handle.remove()
    result["an error of both"] = error, llama.generate(PROMPTS[:2], 5, temperature=0)[0]
    return result


def fail_in_a_hook(*_: object) -> None:
    raise KeyError("a hook's")


def in_a_thread(call: Callable[[], object]) -> None:
    """Calls it in a second thread, and raises its error here."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def test_calls_that_differ_are_one_error_on_all_ranks_and_leave_them_in_step(
    split: Callable[..., Checkpoint], one_process: Result
) -> None:
    first, second = run_ranks(2, different_calls, split(2))
    errors = {name: (first[name][0], second[name][0]) for name in first}
    assert errors.pop("a stream") == (
        "RankError: all ranks must make the same calls, got text_completion on rank 0 and stream_text_completion on "
        "rank 1",
        "RankError: all ranks must make the same calls, got stream_text_completion on rank 1 and text_completion on "
        "rank 0",
    )
    assert "got generate on rank 0 and score_tokens on rank 1" in errors.pop("another kind")[0]
    got, mistake = errors.pop("a mistake")
    assert got == "RankError: all ranks must make the same calls, but rank 1 refused the arguments of this one"
    assert mistake.startswith("PromptError: max_gen_len")
    assert len(set(both := errors.pop("a mistake of both"))) == 1 and both[0].startswith("PromptError: max_gen_len")
    assert len(set(both := errors.pop("another thread"))) == 1
    assert both[0].startswith("RuntimeError: under model parallelism all calls must come from one thread")
    assert errors.pop("an error of both") == ('KeyError: "a hook\'s"',) * 2
    for name, pair in errors.items():
        for rank, error in enumerate(pair):
            assert error.startswith("RankError: all ranks must make the same calls with the same arguments, got"), name
            assert error.endswith(f"on rank {rank} and rank {1 - rank}")
    for rank in (first, second):
        assert [row for _, row in rank.values()] == [[row[:5] for row in one_process["greedy"][:2]]] * len(first)


def a_stream_beside_another_call(rank: int, halves: Checkpoint) -> Iterator[object]:
    llama = halves.build()
    stream = llama.stream_text_completion("The", temperature=0)
    next(stream)
    yield FAULT
    yield message(lambda: next(stream) if rank == 0 else llama.generate([[1]], 4))
    yield message(lambda: llama.generate([[1]], 4))
    yield message(halves.build)
    stream.close()


def test_a_stream_step_and_another_call_end_both_ranks(split: Callable[..., Checkpoint]) -> None:
    for outcome in run_faulty_ranks(2, a_stream_beside_another_call, split(2), within_s=30):
        _, error, *later = outcome.told
        assert error.startswith("RankError: all ranks must make the same calls, got ")
        assert "a step of a stream on rank 0" in error and "generate on rank 1" in error
        assert all("all ranks must make the same calls, got " in error for error in later)
        assert all(error.endswith("restart all ranks") for error in later)


# ---- ranks that fail ----


def fail_in_the_middle(rank: int, halves: Checkpoint, fault: str) -> Iterator[object]:
    """What each rank sees when rank 1 alone has that fault in its third pass, and in the call after it."""
    llama = halves.build()
    passes = itertools.count()

    def hook(*_: object) -> None:
        if rank == 1 and next(passes) == 2:
            if fault == "raise":
                raise ArithmeticError("what rank 1 does")
            os.kill(os.getpid(), signal.SIGKILL)

    llama.model.layers[1].register_forward_hook(hook)
    yield FAULT
    yield message(lambda: llama.generate([[1, 5]], 8, temperature=0))
    yield message(lambda: llama.generate([[1, 5]], 8, temperature=0))


def test_an_error_on_one_rank_ends_the_others(split: Callable[..., Checkpoint]) -> None:
    first, second = run_faulty_ranks(2, fail_in_the_middle, split(2), "raise", within_s=30)
    named = "RankError: rank 1 failed: ArithmeticError: what rank 1 does; restart all ranks"
    assert first.told == [FAULT, named, named]
    assert second.told == [FAULT, "ArithmeticError: what rank 1 does", named]


def test_the_death_of_a_rank_ends_the_others(split: Callable[..., Checkpoint]) -> None:
    first, second = run_faulty_ranks(2, fail_in_the_middle, split(2), "kill", within_s=30)
    assert first.told == [FAULT, *["RankError: rank 1 ended; restart all ranks"] * 2]
    assert second.told == [FAULT]


def skip_a_call(rank: int, halves: Checkpoint, ends: bool) -> Iterator[object]:
    os.environ["LLAMA_RANK_TIMEOUT"] = "120" if ends else "2"
    llama = halves.build()
    yield llama.generate([[1, 5]], 8, temperature=0)[0]
    yield FAULT
    if rank == 0:
        yield message(lambda: llama.generate([[1, 5]], 8, temperature=0))
        time.sleep(0 if ends else 3)  # it holds the store, which tells the late rank
    elif not ends:
        time.sleep(4)
        yield message(lambda: llama.generate([[1, 5]], 8, temperature=0))


@pytest.mark.parametrize("ends", [True, False])
def test_a_missing_call_is_an_error_that_names_the_rank(split: Callable[..., Checkpoint], ends: bool) -> None:
    first, second = run_faulty_ranks(2, skip_a_call, split(2), ends, within_s=40)
    if ends:
        assert first.told[2] == "RankError: rank 1 ended; restart all ranks"
        assert second.told[2:] == []
    else:
        late = "rank 1 did not make the call generate within 2 seconds (set by LLAMA_RANK_TIMEOUT)"
        assert [outcome.told[2] for outcome in (first, second)] == [f"RankError: {late}; restart all ranks"] * 2


def test_a_rank_that_does_not_start_is_named(split: Callable[..., Checkpoint]) -> None:
    (only,) = run_faulty_ranks(2, build_in_two_seconds, split(2), within_s=40, absent=(1,))
    assert only.told[1].startswith("RankError: all 2 ranks must meet at 127.0.0.1:")
    assert "within 2 seconds (set by LLAMA_RANK_TIMEOUT)" in only.told[1]


def build_in_two_seconds(rank: int, halves: Checkpoint) -> Iterator[object]:
    os.environ["LLAMA_RANK_TIMEOUT"] = "2"
    yield FAULT
    halves.build()


def build_and_call(rank: int, checkpoints: list[Checkpoint], max_batch_size: list[int]) -> Iterator[object]:
    yield FAULT
    llama = Llama.build(
        checkpoints[rank].folder,
        checkpoints[rank].tokenizer_path,
        MAX_SEQ_LEN,
        max_batch_size[rank],
        device="cpu",
        dtype="float32",
    )
    yield llama.generate([[1, 5]], 8, temperature=0)[0]


def test_a_shard_that_one_rank_cannot_load_ends_all(
    split_checkpoint: Callable[[int], Path], split: Callable[..., Checkpoint]
) -> None:
    good = split(2)
    bad = Checkpoint(split_checkpoint(2), good.tokenizer_path, None)
    shard = torch.load(bad.folder / "consolidated.01.pth", weights_only=True)
    torch.save(shard | {"norm.weight": torch.ones(3)}, bad.folder / "consolidated.01.pth")
    first, second = run_faulty_ranks(2, build_and_call, [good, bad], [4, 4], within_s=40)
    assert first.told[1].startswith("RankError: rank 1 failed: ValueError: ") and "norm.weight" in first.told[1]
    assert second.told[1].startswith("ValueError: ") and "norm.weight" in second.told[1]


def test_ranks_that_build_different_networks_are_refused(split: Callable[..., Checkpoint]) -> None:
    for outcome in run_faulty_ranks(2, build_and_call, [split(2)] * 2, [4, 2], within_s=40):
        assert outcome.told[1].startswith("RankError: all ranks must make the same calls with the same arguments, got")


def test_under_torchrun_the_error_of_a_shard_stands_once_in_its_report(
    split_checkpoint: Callable[[int], Path], tokenizer_path: Path
) -> None:
    """Without a traceback of ours; the entry of the other rank says why that one stopped."""
    folder = split_checkpoint(2)
    shard = torch.load(folder / "consolidated.01.pth", weights_only=True)
    torch.save(shard | {"norm.weight": torch.ones(3)}, folder / "consolidated.01.pth")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    flags = ["--ckpt_dir", str(folder), "--tokenizer_path", str(tokenizer_path), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "example_text_completion.py"), *flags],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("its configuration, got norm.weight") <= 2, done.stderr  # once per rank
    assert "its configuration, got norm.weight" in done.stderr
    assert 'llama/generation.py"' not in done.stderr
