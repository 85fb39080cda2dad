"""Runs a workload against a server, each request at the time when it is due."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.core.bench.client import request_body, send
from dovetail.core.bench.http import HttpClient
from dovetail.core.bench.metrics import Trace
from dovetail.core.bench.workloads import Sample

__all__ = ["Load", "run_load"]


@dataclass(frozen=True, kw_only=True)
class Load:
    """How the requests are made."""

    route: str
    model: str
    max_concurrency: int | None = None
    """The most requests under way; those due beyond it wait in the client."""
    ignore_eos: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of each request's body, such as ``temperature``."""


async def run_load(
    client: HttpClient,
    load: Load,
    samples: Sequence[Sample],
    times: Sequence[float],
    on_done: Callable[[int], None] = lambda count: None,
) -> tuple[list[Trace], float]:
    """Send each sample at its time, in seconds after the start.

    Args:
        client: The server.
        load: How to ask.
        samples: What to ask.
        times: When, in ascending order; one per sample.
        on_done: Called with the number of requests that have ended, each time one does.

    Returns:
        One trace per sample, in their order; and the seconds from the start to the last end.
    """
    limit = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else None
    bodies = [
        request_body(s, load.route, load.model, ignore_eos=load.ignore_eos, extra=load.extra)
        for s in samples
    ]
    traces = [Trace(prompt_len=sample.prompt_len) for sample in samples]
    num_done = 0

    async def one(body: Mapping[str, Any], trace: Trace) -> None:
        nonlocal num_done
        due = time.perf_counter()
        async with limit or contextlib.nullcontext():
            trace.queue_time = time.perf_counter() - due
            await send(client, load.route, body, trace)
        num_done += 1
        on_done(num_done)

    start = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for body, trace, at in zip(bodies, traces, times, strict=True):
            delay = start + at - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.create_task(one(body, trace))
    return traces, time.perf_counter() - start
