"""The asynchronous engine: the front end of one engine process, which it keeps alive."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import msgspec

from dovetail.core.config.checkpoint import ModelFacts, read_facts
from dovetail.core.config.env import read_environment, with_environment
from dovetail.core.config.schema import EngineConfig
from dovetail.core.engine.api import (
    EngineState,
    EngineStats,
    EngineStatus,
    RequestDelta,
)
from dovetail.core.engine.child import EngineChild
from dovetail.core.engine.intake import Intake, model_info
from dovetail.core.engine.messages import (
    Abort,
    AddRequest,
    Control,
    Failed,
    FromEngine,
    Heartbeat,
    Loading,
    Outputs,
    Ready,
)
from dovetail.core.engine.outputs import OutputAccumulator, OutputProcessor
from dovetail.core.errors import (
    DovetailError,
    EngineDeadError,
    OverloadedError,
    RequestFailedError,
)
from dovetail.core.plugins.selection import Selection, environment, select_platform
from dovetail.core.request import PromptTokens, Request, RequestOutput, SamplingParams
from dovetail.core.tokenizer import Tokenizer, load_tokenizer

__all__ = ["AsyncEngine"]

_log = logging.getLogger(__name__)

_CRASHES_ALLOWED = 3
"""Engine processes that may end on their own within ``_CRASH_WINDOW_S`` before giving up."""
_CRASH_WINDOW_S = 60.0
_CRASHES_PER_REQUEST = 2
"""A request that was running at this many crashes is not tried again."""
_LAST_WORDS_S = 0.05
"""How long messages are still read after the process has ended."""
_SILENCE_S = 30.0
"""Without a heartbeat for this long the process hangs, and is replaced."""


@dataclass(eq=False)
class _Live:
    """A request on its way: what is needed to take it up again on another process."""

    request_id: str
    requests: dict[int, Request]
    queue: asyncio.Queue[RequestDelta | Exception] = field(default_factory=asyncio.Queue)
    crashes: int = 0


class AsyncEngine:
    """Implements ``EngineClient`` over an engine process.

    If the process ends on its own, a new one is started and the running requests are taken up
    where they were: their streams go on. Only a request that keeps ending the process is given up.
    """

    def __init__(
        self,
        config: EngineConfig,
        selection: Selection,
        facts: ModelFacts,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.config = config
        self.selection = selection
        self.info = model_info(facts)
        self.tokenizer = tokenizer
        self.banner: dict[str, str] = {}
        self._intake = Intake(self.info, tokenizer)
        self._outputs = OutputProcessor(tokenizer)
        self._live: dict[str, _Live] = {}
        self._owner: dict[int, _Live] = {}
        self._status = EngineStatus(state="loading", reason="starting the engine process")
        self._stats = EngineStats()
        self._changed = asyncio.Condition()
        self._crash_times: list[float] = []
        self._num_restarts = 0
        self._failure: str | None = None
        self._last_heard = time.monotonic()
        self._child: EngineChild | None = None
        self._keeper: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, config: EngineConfig) -> AsyncEngine:
        """Choose the platform, start the engine process, read the tokenizer meanwhile.

        Returns while the process is still loading; see ``wait_ready``.

        Raises:
            UserError: No such platform, model or tokenizer.
        """
        config = with_environment(config, read_environment(os.environ))
        selection = await asyncio.to_thread(select_platform, config.device, os.environ)
        facts = read_facts(config)
        extra = environment(selection.name, os.environ)
        child = await EngineChild.start(config, selection.name, extra, _log_level())
        try:
            tokenizer = None
            if not config.skip_tokenizer_init:
                tokenizer = await asyncio.to_thread(
                    load_tokenizer,
                    facts.tokenizer_path,
                    mode=config.tokenizer_mode,
                    trust_remote_code=config.trust_remote_code,
                )
            engine = cls(config, selection, facts, tokenizer)
        except BaseException:
            await child.end(0)
            raise
        engine._keeper = asyncio.create_task(engine._keep(child, extra))
        return engine

    @property
    def status(self) -> EngineStatus:
        """Whether requests can be served now."""
        silent = time.monotonic() - self._last_heard
        if self._status.state == "ready" and silent > _SILENCE_S / 2:
            reason = f"the engine process has been silent for {silent:.0f} s"
            return EngineStatus(state="restarting", reason=reason)
        return self._status

    @property
    def stats(self) -> EngineStats:
        """The latest figures of the engine process."""
        return self._stats

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine process, None between two of them."""
        return self._child.pid if self._child else None

    async def wait_ready(self) -> None:
        """Wait until requests are served. Raises EngineDeadError if that will not happen."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._status.state in ("ready", "dead"))
        if self._status.state == "dead":
            raise EngineDeadError(self._status.reason)

    async def stream(
        self,
        prompt: PromptTokens,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestDelta]:
        """See ``EngineClient.stream``."""
        live = await self._submit(prompt, params, request_id, priority, cache_salt)
        finished = False
        try:
            while not finished:
                item = await live.queue.get()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            if not finished:
                await self._abort(live)

    async def generate(
        self,
        prompt: PromptTokens,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """See ``EngineClient.generate``."""
        accumulator = OutputAccumulator(request_id or "", prompt)
        async for delta in self.stream(
            prompt, params, request_id=request_id, priority=priority, cache_salt=cache_salt
        ):
            accumulator.add(delta)
            yield accumulator.output()

    async def _submit(
        self,
        prompt: PromptTokens,
        params: SamplingParams,
        request_id: str | None,
        priority: int,
        cache_salt: str,
    ) -> _Live:
        self._check_open()
        requests = await self._intake.admit(prompt, params, priority, cache_salt)
        self._check_open()
        # The engine's own number keeps apart two requests whose clients chose the same id.
        name = f"{request_id or 'request'}#{requests[0].id}"
        live = _Live(name, {request.id: request for request in requests})
        self._outputs.add(name, prompt, params, list(live.requests), requests[0].stop_token_ids)
        self._live[name] = live
        for request in requests:
            self._owner[request.id] = live
        if self._child is not None and self._status.state == "ready":
            for request in requests:
                await self._child.send(AddRequest(request=request))
        return live

    def _check_open(self) -> None:
        status = self._status
        if status.state == "dead":
            raise EngineDeadError(status.reason)
        if status.state in ("loading", "draining"):
            raise OverloadedError(f"The engine is {status.state}: {status.reason}", status=503)
        limit = self.config.max_num_queued_requests
        if limit is not None and self._stats.num_waiting >= limit:
            raise OverloadedError(f"The queue is full: {limit} requests wait already.")

    async def _abort(self, live: _Live) -> None:
        if self._live.pop(live.request_id, None) is None:
            return
        ids = self._outputs.abort(live.request_id)
        self._forget(live)
        if self._child is not None:
            await self._child.send(Abort(ids=ids))

    def _forget(self, live: _Live) -> None:
        self._live.pop(live.request_id, None)
        for request_id in live.requests:
            self._owner.pop(request_id, None)

    # The engine process.

    async def _keep(self, child: EngineChild, extra: dict[str, str]) -> None:
        """Keep the engine alive; whatever goes wrong here, everybody hears of it."""
        try:
            await self._serve(child, extra)
        except Exception as error:
            _log.exception("the engine's keeper failed")
            await self._give_up(f"{type(error).__name__}: {error}")

    async def _serve(self, child: EngineChild, extra: dict[str, str]) -> None:
        """Serve one process after the other until closed, or until it is no use."""
        while True:
            self._child, self._failure = child, None
            self._last_heard = time.monotonic()
            helpers = [asyncio.create_task(job(child)) for job in (self._read, self._watch)]
            try:
                code = await child.wait()
                await asyncio.sleep(_LAST_WORDS_S)
            finally:
                for task in helpers:
                    task.cancel()
                await asyncio.gather(*helpers, return_exceptions=True)
            self._child = None
            await child.end(0)
            reason = self._failure or f"the engine process ended with status {code}"
            if not await self._may_restart(reason):
                return
            child = await EngineChild.start(self.config, self.selection.name, extra, _log_level())

    async def _may_restart(self, reason: str) -> bool:
        """Decide after the end of a process; tells everybody if there will be no other."""
        was_ready = self._status.state in ("ready", "draining")
        now = time.monotonic()
        self._crash_times = [t for t in self._crash_times if now - t < _CRASH_WINDOW_S] + [now]
        if was_ready and len(self._crash_times) <= _CRASHES_ALLOWED:
            _log.error("%s; starting another one for %d requests", reason, len(self._live))
            self._num_restarts += 1
            await self._set_status("restarting", reason)
            self._blame_running()
            return True
        await self._give_up(reason)
        return False

    async def _give_up(self, reason: str) -> None:
        # A start that fails is reported once, by whoever waits for it.
        _log.log(logging.ERROR if self._live else logging.DEBUG, "giving up: %s", reason)
        await self._set_status("dead", reason)
        for live in list(self._live.values()):
            self._finish(live, EngineDeadError(reason))

    def _blame_running(self) -> None:
        """Requests that were running at too many crashes are not tried again."""
        for live in list(self._live.values()):
            live.crashes += 1
            if live.crashes >= _CRASHES_PER_REQUEST:
                self._finish(live, RequestFailedError("the engine process ended while it ran"))

    def _finish(self, live: _Live, error: DovetailError) -> None:
        self._outputs.abort(live.request_id)
        self._forget(live)
        live.queue.put_nowait(error)

    async def _watch(self, child: EngineChild) -> None:
        """Replace a process that hangs."""
        while True:
            await asyncio.sleep(1)
            if time.monotonic() - self._last_heard > _SILENCE_S:
                _log.error("the engine process has been silent for %d s", _SILENCE_S)
                await child.end(0)
                return

    async def _read(self, child: EngineChild) -> None:
        while True:
            message = await child.receive()
            self._last_heard = time.monotonic()
            await self._take(child, message)

    async def _take(self, child: EngineChild, message: FromEngine) -> None:
        match message:
            case Outputs():
                message.stats.num_restarts = self._num_restarts
                self._stats = message.stats
                await self._deliver(child, message)
            case Heartbeat():
                pass
            case Loading(name=name, done=done, total=total):
                share = f" {100 * done // total}%" if total else ""
                await self._set_status(self._status.state, name + share)
            case Ready():
                await self._resume(child, message)
            case Failed(message=text):
                self._failure = text

    async def _deliver(self, child: EngineChild, outputs: Outputs) -> None:
        result = self._outputs.process(outputs.updates)
        for name, item in result.deltas:
            live = self._live.get(name)
            if live is None:
                continue
            if isinstance(item, Exception) or item.finished:
                self._forget(live)
            live.queue.put_nowait(item)
        if result.aborts:
            await child.send(Abort(ids=result.aborts))

    async def _resume(self, child: EngineChild, ready: Ready) -> None:
        """The process is ready: give it what was running on the one before it."""
        self.banner = ready.banner
        self.info = self._intake.settle(ready.max_model_len, frozenset(ready.features))
        for live in list(self._live.values()):
            for request_id, request in live.requests.items():
                if self._outputs.is_open(request_id):
                    emitted = self._outputs.emitted(request_id)
                    again = msgspec.structs.replace(request, emitted=emitted)
                    await child.send(AddRequest(request=again))
        await self._set_status("ready", "")

    async def _set_status(self, state: EngineState, reason: str) -> None:
        async with self._changed:
            self._status = EngineStatus(state=state, reason=reason)
            self._changed.notify_all()

    # The end.

    async def drain(self, timeout: float) -> None:
        """See ``EngineClient.drain``."""
        if self._status.state != "dead":
            await self._set_status("draining", "the server is shutting down")
        end = time.monotonic() + timeout
        while self._live and time.monotonic() < end:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """See ``EngineClient.close``."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        self._intake.close()
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await self._set_status("dead", "the engine was closed")
        for live in list(self._live.values()):
            self._finish(live, EngineDeadError("the engine was closed"))
        child, self._child = self._child, None
        if child is not None:
            await child.send(Control(name="shutdown"))
            await child.end(2.0)


def _log_level() -> str:
    return logging.getLevelName(logging.getLogger().getEffectiveLevel())
