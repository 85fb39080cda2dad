"""The asynchronous engine: the front end of one engine process, which it keeps alive."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from dovetail.core.config.checkpoint import ModelFacts, read_facts
from dovetail.core.config.env import read_environment, with_environment
from dovetail.core.config.schema import EngineConfig
from dovetail.core.engine.api import EngineState, EngineStats, EngineStatus, RequestDelta
from dovetail.core.engine.child import EngineChild
from dovetail.core.engine.debug import StateRequests
from dovetail.core.engine.gate import Gate
from dovetail.core.engine.intake import CacheRoom, Intake, model_info, read_tokenizer
from dovetail.core.engine.listeners import Listeners
from dovetail.core.engine.live import LiveRequest, LiveRequests, late
from dovetail.core.engine.messages import (
    Abort,
    AddRequest,
    Control,
    Failed,
    FromEngine,
    Loading,
    Outputs,
    Ready,
    State,
)
from dovetail.core.engine.outputs import OutputAccumulator, OutputProcessor
from dovetail.core.engine.restarts import Restarts
from dovetail.core.errors import EngineDeadError, OverloadedError, RequestTimeoutError
from dovetail.core.faults import arm
from dovetail.core.plugins.registry import describe_error
from dovetail.core.plugins.selection import Selection, environment, select_platform
from dovetail.core.request import PromptTokens, RequestOutput, SamplingParams
from dovetail.core.tokenizer import Tokenizer

__all__ = ["AsyncEngine"]

_log = logging.getLogger(__name__)

_LAST_WORDS_S = 0.05
"""How long messages are still read after the process has ended."""
_CLOSE_S = 2.0
"""How long an engine process may take to end when it is told to."""
_SILENCE_S = 30.0
"""Without a heartbeat for this long the process hangs, and is replaced."""


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
        self.info = model_info(facts, config)
        self.tokenizer = tokenizer
        self.banner: dict[str, str] = {}
        self._intake = Intake(self.info, tokenizer)
        self._outputs = OutputProcessor(tokenizer)
        self._gate = Gate(
            config.max_num_queued_requests, config.max_num_queued_tokens, time.monotonic
        )
        self._listeners = Listeners.installed(os.environ)
        self._live = LiveRequests(self._outputs, self._gate, self._listeners)
        self._states = StateRequests()
        # Of what a process that dies at once has said nothing may arrive.
        reason = f"starting the engine process of {selection.described()}"
        self._status = EngineStatus(state="loading", reason=reason)
        self._stats = EngineStats()
        self._changed = asyncio.Condition()
        self._restarts = Restarts()
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
        arm()
        config = with_environment(config, read_environment(os.environ))
        selection = await asyncio.to_thread(select_platform, config.device, os.environ)
        facts = read_facts(config)
        extra = environment(selection.name, os.environ)
        child = await EngineChild.start(config, selection.name, extra)
        try:
            tokenizer = await asyncio.to_thread(read_tokenizer, config, facts)
            engine = cls(config, selection, facts, tokenizer)
        except BaseException:
            await child.end(0)
            raise
        engine._child = child
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

    async def debug_state(self) -> dict[str, Any]:
        """See ``EngineClient.debug_state``."""
        engine = await self._states.ask(self._child)
        return {"status": self._status.state, "num_live": len(self._live), "engine": engine}

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
        timeout: float | None = None,
    ) -> AsyncIterator[RequestDelta]:
        """See ``EngineClient.stream``."""
        live = await self._submit(prompt, params, request_id, priority, cache_salt, timeout)
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
                await self._end(live)

    async def generate(
        self,
        prompt: PromptTokens,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """See ``EngineClient.generate``."""
        accumulator = OutputAccumulator(request_id or "", prompt)
        async for delta in self.stream(
            prompt,
            params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            timeout=timeout,
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
        timeout: float | None,
    ) -> LiveRequest:
        end = None if timeout is None else time.monotonic() + timeout
        self.check_open()
        try:
            async with asyncio.timeout(timeout) as limit:
                requests = await self._intake.admit(prompt, params, priority, cache_salt)
        except TimeoutError:
            if limit.expired():
                raise late(timeout) from None
            raise
        self.check_open(num_sequences=len(requests), num_tokens=len(prompt.token_ids))
        live = self._live.add(request_id or "request", prompt, params, requests)
        if end is not None:
            left = end - time.monotonic()
            self._live.set_deadline(live, left, lambda: self._end(live, late(timeout)))
        if self._child is not None and self._status.state == "ready":
            for request in requests:
                self._child.send(AddRequest(request=request))
        return live

    def check_open(self, *, num_sequences: int = 1, num_tokens: int = 1) -> None:
        """See ``EngineClient.check_open``."""
        status = self._status
        if status.state == "dead":
            raise EngineDeadError(status.reason)
        if status.state in ("loading", "draining"):
            raise OverloadedError(f"The engine is {status.state}: {status.reason}", status=503)
        self._gate.check(self._outputs.num_open, num_sequences, num_tokens)

    async def _end(self, live: LiveRequest, error: RequestTimeoutError | None = None) -> None:
        """End a request early, here and in the engine."""
        ids = self._live.end(live, error)
        if ids and self._child is not None:
            self._child.send(Abort(ids=ids))

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
            reason = self._failure or _last_words(code, self._status)
            if not await self._may_restart(reason):
                return
            child = await EngineChild.start(self.config, self.selection.name, extra)

    async def _may_restart(self, reason: str) -> bool:
        """Decide after the end of a process; tells everybody if there will be no other."""
        was_ready = self._status.state in ("ready", "draining")
        if self._restarts.allow(time.monotonic()) and was_ready:
            _log.error("%s; starting another one for %d requests", reason, len(self._live))
            await self._set_status("restarting", reason)
            self._gate.report(EngineStats())
            self._live.blame_running()
            return True
        await self._give_up(reason)
        return False

    async def _give_up(self, reason: str) -> None:
        # A start that fails is reported once, by whoever waits for it.
        _log.log(logging.ERROR if self._live else logging.DEBUG, "giving up: %s", reason)
        await self._set_status("dead", reason)
        for live in self._live:
            self._live.end(live, EngineDeadError(reason))

    async def _watch(self, child: EngineChild) -> None:
        """Replace a process that hangs."""
        while True:
            await asyncio.sleep(1)
            if time.monotonic() - self._last_heard > _SILENCE_S:
                _log.error("the engine process has been silent for %d s", _SILENCE_S)
                await child.end(0)
                return

    async def _read(self, child: EngineChild) -> None:
        """Take what the process says. If that goes wrong, another process is needed."""
        try:
            while True:
                message = await child.receive()
                self._last_heard = time.monotonic()
                await self._take(child, message)
        except Exception as error:
            _log.exception("what the engine process says cannot be taken")
            self._failure = f"what it said could not be taken: {describe_error(error)}"
            await child.end(0)

    async def _take(self, child: EngineChild, message: FromEngine) -> None:
        match message:
            case Outputs():
                message.stats.num_restarts = self._restarts.count
                self._stats = message.stats
                self._gate.report(message.stats)
                self._listeners.stepped(lambda: self._stats)
                await self._deliver(child, message)
            case State(state=state):
                self._states.answer(state)
            case Loading(name=name, done=done, total=total):
                share = f" {100 * done // total}%" if total else ""
                await self._set_status(self._status.state, name + share)
            case Ready():
                await self._resume(child, message)
            case Failed(message=text):
                self._failure = text

    async def _deliver(self, child: EngineChild, outputs: Outputs) -> None:
        result = self._outputs.process(outputs.updates)
        aborts = [*result.aborts]
        for name, item in result.deltas:
            aborts += self._live.deliver(name, item)
        if aborts:
            child.send(Abort(ids=aborts))

    async def _resume(self, child: EngineChild, ready: Ready) -> None:
        """The process is ready: give it what was running on the one before it."""
        self.banner = ready.banner
        room = CacheRoom(num_blocks=ready.num_blocks, block_size=ready.block_size)
        self.info = self._intake.settle(ready.max_model_len, frozenset(ready.features), room)
        self._gate.max_rows = ready.max_num_seqs
        async with self._changed:
            # Nobody comes between the two: a request is sent here, or by whoever submits it.
            for live in self._live:
                for request_id, request in live.requests.items():
                    if self._outputs.is_open(request_id):
                        emitted = self._outputs.emitted(request_id)
                        again = msgspec.structs.replace(request, emitted=emitted)
                        child.send(AddRequest(request=again))
            self._status = EngineStatus(state="ready", reason="")
            self._changed.notify_all()

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
        for live in self._live:
            self._live.end(live, EngineDeadError("the engine was closed"))
        child, self._child = self._child, None
        if child is not None:
            child.send(Control(name="shutdown"))
            # One that has never been ready is loading, and would hear of it when that is over.
            await child.end(_CLOSE_S if self.banner else 0.0)


def _last_words(code: int, status: EngineStatus) -> str:
    """What to say of a process that ended without a word, and where to look."""
    what = f"the engine process ended with status {code}"
    if code < 0:
        what += f" ({signal.Signals(-code).name})"
    if status.state != "loading":
        return what
    return f"{what} after: {status.reason}; `dovetail doctor` tries each plug-in by itself"
