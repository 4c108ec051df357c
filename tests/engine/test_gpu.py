"""On a CUDA device: the CPU's numbers, graphs against eager launches, seeds, memory. `pytest -m gpu` runs these."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama, ModelArgs, Transformer
from llama.checkpoint.memory import MemoryPlan
from llama.distributed.device import default_generator
from llama.distributed.groups import init_process_groups
from llama.engine.compiled import CompiledStepper
from llama.engine.cuda_graphs import StaticStepper
from tests.support import oracle

TINY_LLAMA = Path(__file__).parents[2] / "tiny-llama"
ONE_BILLION: dict[str, Any] = {
    "dim": 2048,
    "n_layers": 22,
    "n_heads": 32,
    "n_kv_heads": 4,
    "vocab_size": 32000,
    "multiple_of": 256,
    "norm_eps": 1e-5,
}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def tiny(device: str, dtype: str, **options: Any) -> Llama:
    return Llama.build(TINY_LLAMA, TINY_LLAMA / "tokenizer.model", 256, 4, device=device, dtype=dtype, **options)


DIALOGS: list[Any] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Tell me a story about a fox."}],
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "What is two plus two?"}],
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tiny_llama_scores_as_on_the_cpu(dtype: str) -> None:
    texts = ["The quick brown fox jumps over the lazy dog.", "Once upon a time there was a llama.", "2 + 2 = 4"]
    expected = tiny("cpu", "float32").score(texts)
    atol = {"float16": 0.05, "bfloat16": 0.3, "float32": 1e-3}[dtype]
    for got, exact in zip(tiny("cuda", dtype).score(texts), expected, strict=True):
        assert got["tokens"] == exact["tokens"]
        assert got["logprobs"] == pytest.approx(exact["logprobs"], abs=atol)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tiny_llama_answers_as_on_the_cpu(dtype: str) -> None:
    assert tiny("cuda", dtype).chat_completion(DIALOGS, temperature=0) == tiny("cpu", "float32").chat_completion(
        DIALOGS, temperature=0
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_graphs_give_what_eager_launches_give(temperature: float) -> None:
    graphs, eager = tiny("cuda", "float16"), tiny("cuda", "float16", cuda_graphs=False)
    for n in (4, 3, 1):
        options: dict[str, Any] = {"temperature": temperature, "seed": 5, "logprobs": True}
        assert graphs.chat_completion(DIALOGS[:n], **options) == eager.chat_completion(DIALOGS[:n], **options)
    assert isinstance(graphs.stepper, StaticStepper) and graphs.stepper._graphs  # no capture failed


def test_compiled_steps_give_what_the_network_gives() -> None:
    """Of one row and of several, captured and launched one by one."""
    plain = tiny("cuda", "float32")
    for options in ({}, {"cuda_graphs": False}):
        compiled = tiny("cuda", "float32", compile=True, **options)
        for n in (1, 4):
            got, expected = (
                each.chat_completion(DIALOGS[:n], temperature=0, logprobs=True, max_gen_len=40)
                for each in (compiled, plain)
            )
            for mine, theirs in zip(got, expected, strict=True):
                assert mine["tokens"] == theirs["tokens"]
                assert mine["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-3)
        assert isinstance(compiled.stepper, StaticStepper) and isinstance(compiled.stepper._compiled, CompiledStepper)
        assert set(compiled.stepper._compiled._graphs) == {False, True}


def test_int8_is_close_and_its_compiled_steps_give_what_it_gives() -> None:
    exact, quantized = tiny("cuda", "float32"), tiny("cuda", "float32", quantize="int8")
    assert quantized.model.output.weight.dtype == torch.int8
    texts = ["The quick brown fox jumps over the lazy dog.", "Once upon a time there was a llama."]
    for got, expected in zip(quantized.score(texts), exact.score(texts), strict=True):
        assert got["logprobs"] == pytest.approx(expected["logprobs"], abs=0.5) != expected["logprobs"]
    compiled = tiny("cuda", "float32", quantize="int8", compile=True)
    for n in (1, 4):
        got, expected = (each.chat_completion(DIALOGS[:n], 0, max_gen_len=40) for each in (compiled, quantized))
        assert got == expected
    assert set(compiled.stepper._compiled._graphs) == {False, True}  # type: ignore[union-attr]


def test_a_seed_gives_the_same_tokens_again() -> None:
    generator = tiny("cuda", "float16")
    first, again, other = (generator.chat_completion(DIALOGS, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_stream_that_is_left_early_leaves_the_random_stream_where_the_plain_step_does() -> None:
    def second_call(**options: Any) -> Any:
        generator = tiny("cuda", "float16", **options)
        pieces = generator.stream_chat_completion(DIALOGS[1], temperature=1.0)
        for _ in range(3):
            next(pieces)
        pieces.close()
        return default_generator(torch.device("cuda")).get_state()

    assert torch.equal(second_call(), second_call(cuda_graphs=False))


@pytest.fixture(scope="module")
def one_billion() -> dict[str, torch.Tensor]:
    """Random weights of the 1.1B shape, bfloat16, on the CPU."""
    return {name: tensor.bfloat16() for name, tensor in oracle.random_state(ONE_BILLION, seed=0).items()}


def network(state: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> Transformer:
    place = torch.device(device)
    init_process_groups(1, place)
    args = ModelArgs(**ONE_BILLION, max_batch_size=4, max_seq_len=256)
    return Transformer.from_state(args, {name: tensor.to(place, dtype) for name, tensor in state.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_billion_random_weights_give_the_logits_of_the_cpu(
    one_billion: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    tokens = torch.randint(32000, (2, 24), generator=torch.Generator().manual_seed(0))
    exact = network(one_billion, "cpu", torch.float32)
    expected = [exact.forward(tokens[:, :20], 0), exact.forward(tokens[:, 20:21], 20)]
    model = network(one_billion, "cuda", dtype)
    got = [model.forward(tokens[:, :20].cuda(), 0), model.forward(tokens[:, 20:21].cuda(), 20)]
    for mine, theirs in zip(got, expected, strict=True):
        error = (mine.cpu() - theirs).abs().max() / theirs.std()
        assert error < (0.05 if dtype == torch.float16 else 0.3)


def test_steps_of_a_billion_weights_replay_as_they_run(one_billion: dict[str, torch.Tensor]) -> None:
    model = network(one_billion, "cuda", torch.float16)
    eager, graphs = StaticStepper(model, graphs=False), StaticStepper(model, graphs=True)
    with torch.inference_mode():
        for n_rows, length in ((1, 5), (3, 200), (4, 255), (1, 5)):
            tokens = torch.arange(10, 10 + n_rows, device="cuda").unsqueeze(1)
            expected = eager(tokens, [length] * n_rows).clone()
            torch.testing.assert_close(graphs(tokens, [length] * n_rows), expected, rtol=0, atol=0)


def test_the_plan_is_what_the_card_reports() -> None:
    """Within 3 percent, or the tens of MiB that CUDA's libraries take in a tiny network."""
    before = torch.cuda.memory_allocated()
    generator = tiny("cuda", "float16")
    plan = MemoryPlan(generator.model.params, 1, torch.float16)
    taken = torch.cuda.memory_allocated() - before
    assert taken == pytest.approx(plan.weights + plan.kv_cache, rel=0.03, abs=4 * 2**20)


def test_running_out_is_told_with_the_plan_and_a_smaller_call_works() -> None:
    generator = tiny("cuda", "float16")
    expected = generator.chat_completion(DIALOGS[:1], temperature=0)
    long = [[1, *[100] * 200]] * 4
    hog: list[torch.Tensor] = []
    torch.cuda.empty_cache()
    for size in (2**30, 2**24, 2**20, 2**16):  # until not even the least is left
        try:
            while True:
                hog.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            pass
    with pytest.raises(MemoryError, match=r"ran out of memory[\s\S]*KV cache"):
        generator.generate(long, 9, temperature=0)
    hog.clear()
    torch.cuda.empty_cache()
    assert generator.chat_completion(DIALOGS[:1], temperature=0) == expected
