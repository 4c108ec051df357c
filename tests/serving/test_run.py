"""Tests of `llama.serving.run` on a service that does nothing."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest

pytest.importorskip("starlette")

from llama.inputs import SamplingParams
from llama.serving.formats import Counts
from llama.serving.jobs import Job
from llama.serving.metrics import Metrics
from llama.serving.run import Run


class _Service:
    def __init__(self) -> None:
        self.aborted: list[int] = []

    def submit(self, *args: Any, **kwargs: Any) -> int:
        return 7

    def abort(self, number: int) -> None:
        self.aborted.append(number)


def test_a_request_whose_task_is_cancelled_twice_is_aborted() -> None:
    service = _Service()

    async def slow_to_end() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(60)

    async def nothing() -> Any:
        await asyncio.sleep(60)

    async def cancel_twice() -> None:
        job = Job([[1]], SamplingParams(0.0, 1.0, 1))
        run = Run(cast(Any, service), job, Counts(1), Metrics(), arrived=time.perf_counter(), timeout_s=60)
        task = asyncio.ensure_future(run.until_left(slow_to_end(), nothing))
        for _ in range(2):
            await asyncio.sleep(0.05)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_twice())
    assert service.aborted == [7]
