"""The serving loop: what requests get does not depend on the others, and one that ends or leaves frees its slots."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llama import Llama
from llama.engine.output import Piece
from llama.inputs import SamplingParams
from llama.serving.errors import BusyError
from llama.serving.jobs import Job
from llama.serving.service import Service
from tests.conftest import TEXT
from tests.support.processes import wait_until
from tests.support.serving import running

LONGEST_S = 30.0


@pytest.fixture(scope="module")
def service(llama: Llama) -> Iterator[Service]:
    with running(llama) as service:
        yield service


def collect(service: Service, prompts: list[list[int]], params: SamplingParams, **settings: Any) -> list[list[Piece]]:
    """The pieces of each choice of a request."""
    arrived: queue.Queue[Piece | BaseException] = queue.Queue()
    service.submit(Job(prompts, params, **settings), arrived.put)
    choices: list[list[Piece]] = [[] for _ in range(len(prompts) * settings.get("n", 1))]
    n_open = len(choices)
    while n_open:
        piece = arrived.get(timeout=LONGEST_S)
        if isinstance(piece, BaseException):
            raise piece
        assert not (choices[piece.choice] and choices[piece.choice][-1].finish_reason), "a piece after the last one"
        choices[piece.choice].append(piece)
        n_open -= piece.finish_reason is not None
    return choices


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def prompts_of(llama: Llama) -> list[list[int]]:
    return [llama.tokenizer.encode(line, bos=True, eos=False)[:20] for line in TEXT]


def test_a_seed_gives_the_first_of_n_and_each_of_several_prompts_what_it_gives_alone(
    llama: Llama, service: Service
) -> None:
    prompts = prompts_of(llama)
    params = SamplingParams(1.0, 0.9, 12, seed=2**64 - 1)
    together = [text(pieces) for pieces in collect(service, prompts, params, n=3)]
    alone = [text(collect(service, [prompt], params)[0]) for prompt in prompts]
    assert together[::3] == alone
    assert len(set(together)) > len(prompts), "further choices must differ"
    assert together[1] == text(collect(service, [prompts[0]], SamplingParams(1.0, 0.9, 12, seed=0))[0])
    expected = llama.text_completion([llama.tokenizer.decode(prompts[0])], 1.0, 0.9, 12, seed=2**64 - 1)
    assert alone[0] == expected[0]["generation"]


def test_tokens_join_to_the_text_and_have_the_log_probabilities_of_a_call(llama: Llama, service: Service) -> None:
    prompt = prompts_of(llama)[0]
    ids, logprobs = llama.generate([prompt], 30, 1.0, 1.0, logprobs=True, seed=5)
    assert logprobs
    (pieces,) = collect(service, [prompt], SamplingParams(1.0, 1.0, 30, logprobs=True, seed=5), top_logprobs=3)
    tokens = [token for piece in pieces for token in piece.tokens]
    assert [token.id for token in tokens] == ids[0]
    assert "".join(token.text for token in tokens) == text(pieces) == llama.tokenizer.decode(ids[0])
    assert [token.logprob for token in tokens] == pytest.approx(logprobs[0], abs=1e-5)
    assert sum(piece.n_generated for piece in pieces) == 30
    for token in tokens:
        values = [value for _, value in token.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert token.logprob is not None
        assert token.logprob <= values[0] + 1e-5


@pytest.mark.parametrize("seed", range(8))
def test_a_stop_string_and_the_tokens_of_it_never_show(llama: Llama, service: Service, seed: int) -> None:
    prompt = prompts_of(llama)[0]
    whole = text(collect(service, [prompt], SamplingParams(1.0, 1.0, 24, seed=seed))[0])
    rng = random.Random(seed)
    start = rng.randrange(1, len(whole) - 3)
    stop = whole[start : start + rng.randint(1, 3)]
    (pieces,) = collect(service, [prompt], SamplingParams(1.0, 1.0, 24, logprobs=True, seed=seed, stop=[stop]))
    assert text(pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert "".join(token.text for piece in pieces for token in piece.tokens) == text(pieces)
    shown = ""
    for piece in pieces:  # at no time do the tokens run ahead of the text
        shown += "".join(token.text for token in piece.tokens)
        assert whole.startswith(shown)


def test_requests_that_leave_free_their_slots_and_do_not_disturb_the_others(llama: Llama) -> None:
    with running(llama) as service:
        prompt = prompts_of(llama)[1]
        expected = text(collect(service, [prompt], SamplingParams(0, 1, 30))[0])
        rng = random.Random(0)
        for _ in range(60):
            number = service.submit(Job([prompt], SamplingParams(1, 1, 40), rng.randint(1, 3)), lambda piece: None)
            if rng.random() < 0.5:
                time.sleep(rng.random() * 0.01)
            service.abort(number)
        assert text(collect(service, [prompt], SamplingParams(0, 1, 30))[0]) == expected
        wait_until(lambda: service.n_requests == service.engine.n_running == service.n_waiting == 0)
        service.abort(number)  # once more: without effect


def test_a_full_queue_refuses_and_takes_requests_again_later(llama: Llama) -> None:
    service = Service(llama, max_waiting=1)  # besides the 4 that find a free row
    prompt = [1, 5, 9]
    arrived: queue.Queue[Any] = queue.Queue()
    service.submit(Job([prompt], SamplingParams(0, 1, 3), 3), arrived.put)
    service.submit(Job([prompt] * 2, SamplingParams(0, 1, 3)), arrived.put)
    assert service.n_waiting == 5
    with pytest.raises(BusyError, match="at most 1, got 2"):
        service.submit(Job([prompt], SamplingParams(0, 1, 3)), arrived.put)
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        wait_until(lambda: service.n_waiting == 0)
        assert len(text(collect(service, [prompt], SamplingParams(0, 1, 3))[0])) > 0
    finally:
        service.stop()
        thread.join(LONGEST_S)


def test_the_end_of_the_service_is_told_to_all_that_wait(llama: Llama) -> None:
    arrived: queue.Queue[Any] = queue.Queue()
    with running(llama) as service:
        for _ in range(6):
            service.submit(Job([[1, 2, 3]], SamplingParams(1, 1, 60)), arrived.put)
    told = [piece for piece in list(arrived.queue) if isinstance(piece, BaseException)]
    finished = [piece for piece in list(arrived.queue) if isinstance(piece, Piece) and piece.finish_reason]
    assert len(told) + len(finished) == 6
    assert all(isinstance(error, BusyError) for error in told)
    with pytest.raises(BusyError):
        service.submit(Job([[1]], SamplingParams(1, 1, 1)), arrived.put)


def test_an_error_in_a_pass_is_its_requests_and_the_service_goes_on(llama: Llama) -> None:
    def fail(module: torch.nn.Module, args: Any) -> None:
        raise RuntimeError("out of luck")

    prompt = prompts_of(llama)[0]
    with running(llama) as service:
        expected = text(collect(service, [prompt], SamplingParams(0, 1, 5))[0])
        for params in (SamplingParams(0, 1, 5), SamplingParams(0, 1, 5, logprobs=True, echo=True)):
            hook = llama.model.layers[1].register_forward_pre_hook(fail)
            try:
                with pytest.raises(RuntimeError, match="out of luck"):
                    collect(service, [prompt], params)
            finally:
                hook.remove()
            assert text(collect(service, [prompt], SamplingParams(0, 1, 5))[0]) == expected
        assert service.n_requests == service.engine.n_running == service.n_waiting == 0
