"""A watch over the ops of a model: two readings of the clock for each call, and whose it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from dovetail.core.batch import Batch
from dovetail.core.bench.roofline import ATTENTION, NORMS, layer_name
from dovetail.core.contracts.observation import SAMPLING, ObservableRunner
from dovetail.core.contracts.platform import Platform
from dovetail.core.contracts.runner import Runner
from dovetail.core.errors import UnsupportedError
from dovetail.core.types import IntArray

__all__ = ["ACTIVATIONS", "EMBEDDING", "OpClock", "OpTime", "StepOps", "observed"]

ACTIVATIONS, EMBEDDING = "activations", "embedding and rotary"

_CLASSES: Mapping[str, str] = {
    "attention": ATTENTION,
    "rotary_attention": ATTENTION,
    "rms_norm": NORMS,
    "add_rms_norm": NORMS,
    "layer_norm": NORMS,
    "embedding": EMBEDDING,
    "scale": EMBEDDING,
    "rotary": EMBEDDING,
    **dict.fromkeys(("silu_and_mul", "gelu_tanh_and_mul", "soft_cap"), ACTIVATIONS),
    **dict.fromkeys(("gelu", "gelu_tanh", "relu", "silu", "add"), ACTIVATIONS),
    SAMPLING: SAMPLING,
}
"""Of ops by name. Any other is of the class of the layer that it is given, or one of its own."""
_LOOKED_UP = "embedding"
"""The op that reads as much from its table as it gives."""
_UNWATCHED = ("all_reduce",)
"""On one device they do nothing."""


@dataclass
class OpTime:
    """All calls of one class in one step. Filled in as it goes."""

    calls: int = 0
    seconds: float = 0.0
    num_bytes: int = 0
    """Of the arrays that went in and came out, parameters left out."""


@dataclass(frozen=True, kw_only=True)
class StepOps:
    """One step."""

    query_lens: IntArray
    """(R,) tokens of each row."""
    context_lens: IntArray
    """(R,) positions of each row, those tokens included."""
    num_places: int
    """Tokens that got a successor."""
    is_watched: bool
    """Whether its ops were timed."""
    times: dict[str, OpTime] = field(default_factory=dict)
    """By class."""


def observed(platform: Platform, runner: Runner) -> ObservableRunner:
    """The runner itself. Raises UnsupportedError if its ops, or its model's, cannot be watched."""
    if not isinstance(runner, ObservableRunner):
        raise UnsupportedError(
            f"platform {platform.name} cannot be looked into: its runner gives the device whole"
            " programs, or computes nothing. `dovetail bench latency` measures whole steps"
        )
    with runner.wrap_ops(lambda name, function: function):
        return runner


class OpClock:
    """Times the ops of an observed runner, in the steps in which it is told to.

    An op that calls others counts once, with everything that it calls.

    Args:
        runner: Its ops are wrapped while they are timed, and as they were else.
        synchronize: Waits for the device, before and after each op.
        clock: Seconds from some fixed point on.
    """

    def __init__(
        self,
        runner: ObservableRunner,
        synchronize: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._synchronize = synchronize
        self._clock = clock
        self._is_inside = False
        self._watching = ExitStack()
        self._is_watching = False
        self.clear()

    def clear(self) -> None:
        """Forget all steps."""
        self.steps: list[StepOps] = []

    def begin(self, batch: Batch, *, watch: bool) -> None:
        """What is called from now on belongs to this step.

        Args:
            batch: The step that is about to be started.
            watch: Whether its ops are timed.
        """
        if watch != self._is_watching:
            self._switch(watch)
        step = StepOps(
            query_lens=batch.query_lens.copy(),
            context_lens=batch.sequence_lens.copy(),
            num_places=len(batch.logit_index),
            is_watched=watch,
        )
        self.steps.append(step)

    def close(self) -> None:
        """Leave the runner's ops as they were."""
        self._switch(False)

    def _switch(self, on: bool) -> None:
        self._watching.close()
        if on:
            view = self._watching.enter_context(self._runner.wrap_ops(self._wrap))
            self._layers = {key: layer_name(path) for key, path in view.parameters.items()}
            self._num_bytes = view.num_bytes
        self._is_watching = on

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if name in _UNWATCHED:
            return function
        synchronize, clock = self._synchronize, self._clock

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return function(*args, **kwargs)
            synchronize()
            self._is_inside = True
            begin = clock()
            try:
                result = function(*args, **kwargs)
                synchronize()
                seconds = clock() - begin
            finally:
                self._is_inside = False
            self._note(name, (*args, *kwargs.values()), result, seconds)
            return result

        return watched

    def _note(self, name: str, args: tuple[Any, ...], result: Any, seconds: float) -> None:
        layers, num_bytes = self._layers, self._num_bytes
        kind = _CLASSES.get(name)
        if kind is None:
            kind = next((layers[id(arg)] for arg in args if id(arg) in layers), name)
        noted = self.steps[-1].times.setdefault(kind, OpTime())
        noted.calls += 1
        noted.seconds += seconds
        if kind != ATTENTION:
            given = num_bytes(result) * (2 if name == _LOOKED_UP else 1)
            taken = sum(num_bytes(arg) for arg in args if id(arg) not in layers)
            noted.num_bytes += given + taken
