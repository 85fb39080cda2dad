"""Tells the listeners of plug-ins about the life of requests. Without listeners it does nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import pluggy

from dovetail.core.engine.api import EngineStats, RequestDelta
from dovetail.core.plugins.hooks import hook_manager
from dovetail.core.request import FinishReason, Request

__all__ = ["Listeners"]


@dataclass
class _Sequence:
    request: Request
    num_generated: int = 0
    has_ended: bool = False


class Listeners:
    """Calls the hooks of ``plugins.hooks`` for the requests of one front end.

    A listener hears of each sequence: of ``n`` completions n times. Those that were computed but
    not given to the client (``best_of``) end with ``abort``.
    """

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self._hook = manager.hook
        self._is_heard = bool(manager.list_name_plugin())
        self._open: dict[str, list[_Sequence]] = {}
        """The sequences of each request, by the index of their completion."""

    @classmethod
    def installed(cls, environ: Mapping[str, str]) -> Listeners:
        """With all listeners that are installed and admitted. Raises PluginError."""
        return cls(hook_manager(environ))

    def started(self, name: str, requests: Sequence[Request]) -> None:
        """A request was validated; ``name`` is the front end's."""
        if self._is_heard:
            self._open[name] = [_Sequence(request) for request in requests]
            for request in requests:
                self._hook.dovetail_request_started(request=request)

    def delivered(self, name: str, delta: RequestDelta) -> None:
        """There are new tokens, and perhaps ends."""
        opened = self._open.get(name)
        if opened is None:
            return
        for new in delta.completions:
            if new.index < len(opened):
                sequence = opened[new.index]
                sequence.num_generated += len(new.token_ids)
                if new.finish_reason is not None:
                    self._end(sequence, new.finish_reason)
        if delta.finished:
            self.ended(name, "abort")

    def ended(self, name: str, reason: FinishReason) -> None:
        """Nothing more comes: what has not ended by itself ends with ``reason``."""
        opened = self._open.pop(name, None)
        for sequence in opened or ():
            self._end(sequence, reason)

    def _end(self, sequence: _Sequence, reason: FinishReason) -> None:
        if not sequence.has_ended:
            sequence.has_ended = True
            self._hook.dovetail_request_finished(
                request=sequence.request,
                finish_reason=reason,
                num_generated=sequence.num_generated,
                seconds=time.monotonic() - sequence.request.arrival_time,
            )

    def stepped(self, stats: Callable[[], EngineStats]) -> None:
        """The engine has reported. ``stats`` is called only if somebody listens."""
        if self._is_heard:
            self._hook.dovetail_step_finished(stats=msgspec.structs.asdict(stats()))
