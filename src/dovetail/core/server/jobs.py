"""Runs the prompts of one request in the engine, side by side."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from dovetail.core.engine.api import EngineClient, RequestDelta
from dovetail.core.errors import (
    OverloadedError,
    RequestError,
    RequestFailedError,
    RequestTimeoutError,
)
from dovetail.core.request import PromptTokens, SamplingParams
from dovetail.core.server.forms import in_clients_words
from dovetail.core.server.metrics import Metrics, RequestRecord

__all__ = ["Deltas", "Job", "run_jobs"]

Deltas = AsyncGenerator[tuple[int, RequestDelta], None]
"""What comes from the engine, each with the number of its prompt."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt, ready for the engine."""

    prompt: PromptTokens
    params: SamplingParams
    request_id: str
    """Made by the server."""
    arrival: float
    """When the client's request came, on ``time.perf_counter``."""
    priority: int = 0
    cache_salt: str = ""
    form_field: str = ""
    """The field of the client's request that asked for the form of the answer, if any did."""
    timeout: float | None = None
    """Seconds from arrival in which it must end."""

    def time_left(self) -> float | None:
        """Seconds of ``timeout`` that are left, perhaps none."""
        if self.timeout is None:
            return None
        return max(0.0, self.timeout - (time.perf_counter() - self.arrival))


async def run_jobs(client: EngineClient, jobs: list[Job], metrics: Metrics) -> Deltas:
    """Generate for all jobs at once. Closing this aborts them.

    Raises:
        DovetailError: What the engine raised for any one of them; the others are aborted.
    """
    streams = [_run(client, index, job, metrics) for index, job in enumerate(jobs)]
    merged = streams[0] if len(streams) == 1 else _merge(streams)
    async with contextlib.aclosing(merged):
        async for item in merged:
            yield item


async def _run(client: EngineClient, index: int, job: Job, metrics: Metrics) -> Deltas:
    """One job, with its figures recorded."""
    record = RequestRecord(
        metrics,
        job.arrival,
        len(job.prompt.token_ids),
        job.params.n,
        job.params.max_tokens or 0,
    )
    outcome = "abort"
    stream = client.stream(
        job.prompt,
        job.params,
        request_id=job.request_id,
        priority=job.priority,
        cache_salt=job.cache_salt,
        timeout=job.time_left(),
    )
    try:
        async for delta in stream:
            _refuse_failed(delta)
            record.delta(delta)
            yield index, delta
        outcome = "done"
    except RequestTimeoutError:
        outcome = "timeout"
        raise
    except RequestError as error:
        outcome = "error"
        raise in_clients_words(error, job.form_field) from None
    except Exception:
        outcome = "error"
        raise
    finally:
        record.end(outcome)
        await _close(stream)


def _refuse_failed(delta: RequestDelta) -> None:
    """``abort`` and ``error`` are the engine's words; to a client they are errors."""
    for completion in delta.completions:
        if completion.finish_reason == "error":
            raise RequestFailedError("the engine ended the request with an error")
        if completion.finish_reason == "abort":
            raise OverloadedError("The request was aborted by the server.", status=503)


async def _close(stream: AsyncIterator[RequestDelta]) -> None:
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()


async def _merge(streams: list[Deltas]) -> Deltas:
    """Whatever comes first from any of ``streams``."""
    queue: asyncio.Queue[tuple[int, RequestDelta] | BaseException | None] = asyncio.Queue(1)

    async def pump(stream: Deltas) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    await queue.put(item)
        except Exception as exc:
            await queue.put(exc)
        else:
            await queue.put(None)

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(pumps)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
