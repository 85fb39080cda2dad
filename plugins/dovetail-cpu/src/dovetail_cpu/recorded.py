"""Steps of a few tokens, recorded once for each number of them and repeated without Python.

A forward pass is then a list of calls of kernels over memory that stays where it is. What differs
from step to step are token numbers, positions and the attention's plan, which are copied to where
the calls look for them. A pass in which anything but kernels touched numbers cannot be repeated,
and is run as ever.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dovetail.core.contracts.attention import AttentionBackend, AttentionSpec
from dovetail.core.contracts.model import StepInputs
from dovetail.core.contracts.observation import OpsView, Wrap
from dovetail.core.types import IntArray
from dovetail.platforms.torch.loading import RunnableModel
from dovetail_cpu.attention import Plan
from dovetail_cpu.kernels import Kernels, StepStruct

__all__ = ["MOST_TOKENS", "RecordedModel"]

MOST_TOKENS = 64
"""Steps of more are long beside what Python takes for them."""
_ALIGNMENT = 64
_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
)
_log = logging.getLogger(__name__)


class RecordedModel:
    """A model whose short steps are recorded.

    Args:
        model: Runs over kernels; other ops are found out.
        kernels: For this processor.
    """

    def __init__(self, model: RunnableModel, kernels: Kernels) -> None:
        self._model = model
        self._kernels = kernels
        self._records: dict[int, _Record] = {}
        self._room = _Room()
        self._obstacle: str | None = None
        self._is_watched = False
        self.vocab_size = model.vocab_size
        self.attention_specs: tuple[AttentionSpec, ...] = model.attention_specs
        self.narrows = model.narrows

    def bind_attention(self, backend: AttentionBackend) -> None:
        """See ``RunnableModel``."""
        self._model.bind_attention(backend)

    @contextmanager
    def wrap_ops(self, wrap: Wrap) -> Iterator[OpsView]:
        """See ``RunnableModel``. Nothing is repeated meanwhile."""
        self._is_watched = True
        try:
            with self._model.wrap_ops(wrap) as view:
                yield view
        finally:
            self._is_watched = False

    def positions(self, positions_T: IntArray) -> IntArray:
        """See ``RunnableModel``."""
        return self._model.positions(positions_T)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """See ``RunnableModel``."""
        return self._model.logits(hidden_ND)

    def describe(self) -> dict[str, str]:
        """See ``RunnableModel``."""
        return self._model.describe()

    def forward(self, inputs: StepInputs, caches: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """See ``RunnableModel``. The hidden states are void when the next step begins."""
        count, plan = len(inputs.token_ids_T), inputs.plan
        whole = isinstance(plan, Plan) and not plan.num_padding and inputs.wanted is None
        if not whole or count > MOST_TOKENS or self._is_watched or self._obstacle is not None:
            return self._model.forward(inputs, caches)
        record = self._records.get(count)
        if record is None or record.cache is not caches[0]:
            return self._record(inputs, caches)
        return record.repeat(inputs), list(caches)

    def _record(self, inputs: StepInputs, caches: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Run a step and note its calls."""
        tape, watch = self._kernels.tape, _Watch(self._room)
        if not tape.begin():
            return self._model.forward(inputs, caches)
        # What the calls will look at is written to later, and may be nobody else's.
        tokens, positions = inputs.token_ids_T.clone(), inputs.positions_T.clone()
        inputs = replace(inputs, token_ids_T=tokens, positions_T=positions)
        try:
            with watch:
                hidden, written = self._model.forward(inputs, caches)
        finally:
            calls, kept = tape.end()
        if watch.obstacle is not None:
            self._obstacle = watch.obstacle
            _log.debug("steps are not recorded: they use %s", watch.obstacle)
            return hidden, written
        count = len(inputs.token_ids_T)
        self._records[count] = _Record(
            self._kernels, calls, inputs, hidden, caches[0], (kept, self._room)
        )
        return hidden, written


@dataclass(frozen=True)
class _Record:
    """A forward pass, ready to be repeated."""

    kernels: Kernels
    calls: NDArray[np.int64]
    inputs: StepInputs
    """Where the calls look for what a step brings."""
    hidden: Tensor
    cache: Any
    """The first layer's, which the calls write to."""
    held: object
    """What the calls point to."""

    def repeat(self, inputs: StepInputs) -> Tensor:
        """The hidden states (T, D) of other inputs of as many tokens."""
        self.inputs.token_ids_T.copy_(inputs.token_ids_T)
        self.inputs.positions_T.copy_(inputs.positions_T)
        plan, own = inputs.plan, self.inputs.plan
        if not isinstance(plan, Plan) or not isinstance(own, Plan):
            raise TypeError(f"a plan of another backend: {type(plan).__name__}")
        ctypes.memmove(ctypes.byref(own.step), ctypes.byref(plan.step), ctypes.sizeof(StepStruct))
        self.kernels.replay(self.calls.ctypes.data, len(self.calls))
        return self.hidden


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives tensors memory of a room, and notices ops that touch numbers.

    Args:
        room: The memory.
    """

    def __init__(self, room: _Room) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.obstacle: str | None = None
        self._room = room

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its compiler, which takes a second, to say what not to compile.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            return self._room.tensor_like(out)
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.obstacle = self.obstacle or str(func)
        return out


class _Room:
    """Memory of fixed addresses: what nobody holds any more is given to the next who asks."""

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)

    def tensor_like(self, model: Tensor) -> Tensor:
        """A dense tensor of the same shape and dtype."""
        wanted = max(model.numel() * model.element_size(), _ALIGNMENT)
        size = 1 << (wanted - 1).bit_length()
        free = self._free[size]
        block = free.pop() if free else np.empty(size + _ALIGNMENT, np.uint8)
        start = -block.ctypes.data % _ALIGNMENT
        view = block[start : start + wanted]
        weakref.finalize(view, free.append, block)
        flat = torch.from_numpy(view)[: model.numel() * model.element_size()]
        return flat.view(model.dtype).view(model.shape)
