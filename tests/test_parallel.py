"""Several ranks over gloo: what one process gives, all of them give, whatever their number and whoever stops early.

Each `world_N` fixture starts N processes once, has them do everything, and returns what each of them saw.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import destroy_model_parallel

from llama import Llama
from tests import oracle
from tests.ranks import run_ranks

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
def split(
    write_checkpoint: Callable[..., Path], tokenizer_path: Path, params: dict[str, Any], state: oracle.State
) -> Callable[..., Checkpoint]:
    """The random checkpoint in that many files."""

    def split(files: int, size: int | None = None) -> Checkpoint:
        return Checkpoint(write_checkpoint(params, state, files), tokenizer_path, size)

    return split


@pytest.fixture(scope="module")
def one_process(split: Callable[..., Checkpoint]) -> Result:
    return every_call(split(1).build())


@pytest.fixture(scope="module")
def one_process_unseeded(split: Callable[..., Checkpoint]) -> list[Any]:
    return unseeded_calls(split(1).build(seed=5))


# ---- two ranks: MP 2, then two replicas of MP 1 ----


def early_exits(llama: Llama, rank: int) -> list[Any]:
    """Streams that the ranks leave at different moments, a call after each."""
    seen: list[Any] = []
    for leaver, pieces in ((0, 1), (1, 1), (0, 3), (1, 3)):
        stream = llama.stream_text_completion("The", temperature=1.0, max_gen_len=9, seed=14)
        if rank == leaver:
            seen.append(list(islice(stream, pieces)))
            stream.close()
        else:
            seen.append(list(stream))
        seen.append(llama.generate(PROMPTS[:2], 5, temperature=0)[0])
    both = llama.stream_text_completion("The", temperature=1.0, max_gen_len=9, seed=14)
    seen.append(list(islice(both, 1 + rank)))
    both.close()
    for piece in llama.stream_text_completion("The", temperature=1.0, max_gen_len=9, seed=14):
        seen.append([piece])
        if rank == 0:
            break  # the generator is closed when it is forgotten
    return seen


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
    result["backend"] = dist.get_backend()
    result["shapes"] = {name: tuple(tensor.shape) for name, tensor in llama.model.state_dict().items()}
    result["cache"] = tuple(llama.model.layers[0].attention.cache_k.shape)
    result["unseeded"] = unseeded_calls(llama)
    result["calls"] = every_call(llama)
    result["early exits"] = early_exits(llama, rank)
    result["beside"] = stream_beside_calls(llama)
    result["another size"] = message(lambda: whole.build(size=1))
    second = halves.build()
    result["second build"] = second.generate(PROMPTS, 8, temperature=0)[0]
    result["first build"] = llama.generate(PROMPTS, 8, temperature=0)[0]
    torch.manual_seed(100 + rank)
    before = torch.get_rng_state()
    result["bfloat16"] = halves.build(dtype=None, seed=None).model.forward(TOKENS, 0)
    result["default generator kept"] = torch.equal(torch.get_rng_state(), before)
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
    whole = one_process["stream"]
    for result in world_2:
        after = []
        for seen in result["early exits"]:
            if isinstance(seen[0], str):
                assert whole.startswith("".join(seen)) or whole.find(seen[0]) >= 0
            else:
                after.append(seen)
        assert after == [[row[:5] for row in one_process["greedy"][:2]]] * 4
    first, second = ([s for s in result["early exits"] if isinstance(s[0], str)] for result in world_2)
    assert "".join(first[1]) == "".join(first[3]) == whole  # where rank 1 left, rank 0 got the rest
    assert len(first[0]) == 1 and len(first[2]) == 3
    assert second[0] != first[1] and whole.startswith("".join(second[0]))  # where rank 0 left, rank 1 ended too


def test_streams_and_calls_go_side_by_side_on_all_ranks(
    world_2: list[Result], split: Callable[..., Checkpoint]
) -> None:
    alone = split(1).build()
    the, dog = (alone.text_completion([text], temperature=0, max_gen_len=9)[0]["generation"] for text in ("The", "dog"))
    row = alone.generate(PROMPTS[:2], 5, temperature=0)[0]
    assert [result["beside"] for result in world_2] == [[the, row, [the, dog]]] * 2


def leave_before_the_first_piece(rank: int, halves: Checkpoint) -> list[Any]:
    faulthandler.dump_traceback_later(20, exit=True)
    llama = halves.build()
    seen: list[Any] = []
    for leaver in (0, 1):
        stream = llama.stream_text_completion("The", temperature=1.0, max_gen_len=9, seed=14)
        if rank == leaver:
            stream.close()
        else:
            seen.append("".join(stream))
        seen.append(llama.generate(PROMPTS[:2], 5, temperature=0)[0])
    return seen


def test_ranks_that_leave_a_stream_before_its_first_piece_stay_in_step(
    split: Callable[..., Checkpoint], one_process: Result
) -> None:
    greedy = [row[:5] for row in one_process["greedy"][:2]]
    first, second = run_ranks(2, leave_before_the_first_piece, split(2))
    assert first == [greedy, one_process["stream"], greedy]
    assert second == ["", greedy, greedy]


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


def test_a_second_build_beside_the_first(world_2: list[Result], one_process: Result) -> None:
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
    assert [result["printed"] for result in world_2] == ["", ""]
    assert [result["backend"] for result in world_2] == ["gloo", "gloo"]
    assert all(result["default generator kept"] for result in world_2)


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


# ---- eight ranks ----

EIGHT = {"dim": 64, "n_layers": 1, "n_heads": 16, "n_kv_heads": 8, "multiple_of": 16, "norm_eps": 1e-5}


def eight_ranks(rank: int, eighths: Checkpoint, too_few_heads: Checkpoint) -> Result:
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    error = message(too_few_heads.build)
    llama = eighths.build()
    forward = llama.model.forward(TOKENS, 0)
    return {"error": error, "forward": forward, "greedy": llama.generate(PROMPTS[:5], 4, temperature=0)[0]}


def test_mp_8_equals_the_oracle_and_one_process(
    write_checkpoint: Callable[..., Path],
    tokenizer_path: Path,
    params: dict[str, Any],
    state: oracle.State,
    split: Callable[..., Checkpoint],
) -> None:
    eight = EIGHT | {"vocab_size": params["vocab_size"]}
    weights = oracle.random_state(eight, seed=6)
    folders = [write_checkpoint(eight, weights, 8), write_checkpoint(eight, weights, 1)]
    eighths, whole = (Checkpoint(folder, tokenizer_path, None) for folder in folders)
    expected = whole.build().generate(PROMPTS[:5], 4, temperature=0)[0]
    for result in run_ranks(8, eight_ranks, eighths, split(8)):
        assert result["error"].startswith(
            "ValueError: n_kv_heads (4) must be a multiple of the model-parallel size (8)"
        )
        torch.testing.assert_close(result["forward"], oracle.logits(weights, eight, TOKENS), atol=1e-4, rtol=0)
        assert result["greedy"] == expected
