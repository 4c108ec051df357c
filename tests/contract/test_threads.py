"""Threads and streams get what each gets alone; calls inside calls are refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import Llama
from llama.errors import PromptError
from tests.support.builds import PROMPTS, Built, patched

TEXTS = ["The quick brown", "Llamas", "A tiny tokenizer knows", "bytes do the rest", "eat grass", "12345", "dog", "in"]


@pytest.fixture(params=["bfloat16, one row", "float32", "static steps", "captured steps"])
def shared(request: pytest.FixtureRequest, make: Callable[[str], Built]) -> Built:
    """One network for several threads. Packed builds round otherwise where a stream's cache is computed anew."""
    return make(request.param)


def all_calls(llama: Llama, i: int) -> list[Any]:
    """What one user asks for, with results that differ from user to user."""
    options: dict[str, Any] = {"temperature": 0.9, "seed": i, "max_gen_len": 5}
    return [
        "".join(llama.stream_text_completion(TEXTS[i], **options)),
        llama.generate([PROMPTS[i % 6], PROMPTS[i % 5]], 5, temperature=0.9, seed=i, logprobs=True)[0],
        llama.text_completion(TEXTS[i : i + 3], **options),
        "".join(llama.stream_chat_completion([{"role": "user", "content": TEXTS[i]}], **options)),
        llama.score(TEXTS[i : i + 2])[0]["tokens"],
    ]


def at_once(n_threads: int, call: Callable[[int], Any]) -> list[Any]:
    """The results of `call(i)` in as many threads."""
    together = threading.Barrier(n_threads)

    def start(i: int) -> Any:
        together.wait()
        return call(i)

    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(start, range(n_threads)))


@pytest.mark.parametrize("name", ["float32", "captured steps"])
def test_eight_threads_get_what_each_gets_alone(make: Callable[[str], Built], name: str) -> None:
    """Two threads on one Llama got each other's text."""
    shared = make(name).llama
    alone = [all_calls(shared, i) for i in range(8)]
    assert len({str(result) for result in alone}) == 8
    assert at_once(8, lambda i: all_calls(shared, i)) == alone


def test_two_threads_get_what_each_gets_alone_in_every_build(built: Built) -> None:
    def call(i: int) -> list[Any]:
        return [built.llama.generate([PROMPTS[i]], 6, temperature=0) for _ in range(5)]

    alone = [call(0), call(1)]
    assert alone[0] != alone[1]
    assert at_once(2, call) == alone


def test_llamas_that_share_a_network_take_turns_too(make: Callable[[str], Built]) -> None:
    first = make("float32").llama
    second = Llama(first.model, first.tokenizer)
    alone = first.generate(PROMPTS, 12, temperature=0)
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(each.generate, PROMPTS, 12, temperature=0) for each in (first, second) * 4]
    assert all(each.result() == alone for each in work)


def interrupted(llama: Llama, between: Callable[[], object], **options: Any) -> str:
    return "".join(
        [(piece, between())[0] for piece in llama.stream_text_completion(TEXTS[0], max_gen_len=6, **options)]
    )


def refused(llama: Llama) -> None:
    with pytest.raises(PromptError):
        llama.generate([[1]], 2, top_p=2)


BETWEEN: dict[str, Callable[[Llama], object]] = {
    "model.forward": lambda llama: llama.model.forward(torch.tensor([[9, 8, 7, 6, 5, 4, 3, 2, 1] * 3]), 0),
    "model": lambda llama: llama.model(torch.tensor([[9, 8, 7, 6, 5, 4, 3, 2, 1] * 3]), 0),
    "one position": lambda llama: llama.model(torch.tensor([[9]]), 2).shape,
    "in inference mode": torch.inference_mode()(lambda llama: llama.model(torch.tensor([[9, 8, 7]]), 0)),
    "generate": lambda llama: llama.generate([[9] * 20], 3, seed=1),
    "another stream": lambda llama: list(llama.stream_text_completion(TEXTS[1], max_gen_len=5, seed=1)),
    "score": lambda llama: llama.score(TEXTS[:1]),
    "a refused call": lambda llama: refused(llama),
    "the cache overwritten": lambda llama: llama.model.layers[0].attention.cache_k.fill_(9.0),
    "the cache assigned": lambda llama: setattr(
        llama.model.layers[1].attention, "cache_v", torch.ones_like(llama.model.layers[1].attention.cache_v)
    ),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_a_stream_goes_on_whatever_comes_between_its_pieces(shared: Built, what: str) -> None:
    """`model.forward` between two pieces corrupted the stream. What comes between gets what it gets alone, too."""
    # A cache that is computed anew in bfloat16 may round differently.
    options: dict[str, Any] = {"temperature": 0.0 if shared.dtype == torch.bfloat16 else 0.9, "seed": 3}
    expected, alone, between = interrupted(shared.llama, lambda: None, **options), BETWEEN[what](shared.llama), []
    assert interrupted(shared.llama, lambda: between.append(BETWEEN[what](shared.llama)), **options) == expected
    assert interrupted(shared.llama, lambda: None, **options) == expected
    for result in between:
        if isinstance(alone, Tensor):
            torch.testing.assert_close(result, alone, rtol=0, atol=shared.tolerance)
        else:
            assert result == alone or shared.dtype == torch.bfloat16


def test_a_stream_of_a_network_with_its_own_forward_goes_on_too(shared: Built) -> None:
    model = shared.model
    model.forward = patched(model.forward, 1.0)
    for what in ("generate", "another stream", "score", "model"):
        expected = interrupted(shared.llama, lambda: None, temperature=0.0)
        assert interrupted(shared.llama, lambda what=what: BETWEEN[what](shared.llama), temperature=0.0) == expected


def test_a_stream_closed_late_does_not_rewind_the_generator(shared: Built) -> None:
    """It set the generator back to where it stood before a call that had drawn from it since."""
    torch.manual_seed(0)
    stream = shared.llama.stream_text_completion(TEXTS[0], temperature=1.0, max_gen_len=12)
    next(stream)
    torch.rand(3)
    shared.llama.generate([[1, 2, 3]], 3, temperature=1.0)
    before = torch.get_rng_state()
    stream.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_from_inside_of_another_is_refused(shared: Built) -> None:
    """A hook that generates would otherwise wait for itself."""
    handle = shared.model.register_forward_hook(lambda *_: shared.llama.generate([[1]], 1) and None)
    with pytest.raises(RuntimeError, match="from inside another"):
        shared.llama.generate([[1, 2]], 2)
    handle.remove()
    shared.assert_unedited()


def test_two_threads_leave_onednns_switch_on(make: Callable[[str], Built]) -> None:
    """Each turned it off for a single row's product; the second one took "off" for the state to put back."""
    layer = make("bfloat16, one row").model.output
    assert torch._C._get_mkldnn_enabled()
    x = torch.randn((1, 32), dtype=torch.bfloat16)
    expected = layer(x)

    @torch.inference_mode()
    def multiply(_: int) -> bool:
        return all(torch.equal(layer(x), expected) for _ in range(2000))

    assert at_once(2, multiply) == [True, True]
    assert torch._C._get_mkldnn_enabled()
