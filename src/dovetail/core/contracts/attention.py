"""The attention contract. A backend owns its KV layout, its metadata, the KV write and the attend.

Offered through an entry-point group, ``dovetail.attention_backends`` for torch's tensors and
``dovetail.attention_backends.FAMILY`` for another family of arrays, or by a platform directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from dovetail.core.batch import Batch
from dovetail.core.types import Array, IntArray

__all__ = [
    "AttentionBackend",
    "AttentionNeed",
    "AttentionSpec",
    "RecordableAttention",
    "RotaryAttention",
]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The attention of one layer, on one device (heads are those of this device)."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    """Factor of the dot products, before the soft cap."""
    window: int | None = None
    """A position attends to itself and at most ``window - 1`` positions before it."""
    soft_cap: float | None = None
    """Scores become ``cap * tanh(score / cap)`` before the softmax (Gemma 2)."""
    alibi_slopes: tuple[float, ...] | None = None
    """(H,) added to the score: slope times (key position - query position)."""

    @property
    def features(self) -> frozenset[str]:
        """What this layer asks for beyond plain causal attention."""
        wanted = {
            "window": self.window is not None,
            "soft_cap": self.soft_cap is not None,
            "alibi": self.alibi_slopes is not None,
        }
        return frozenset(name for name, on in wanted.items() if on)


@dataclass(frozen=True, kw_only=True)
class AttentionNeed:
    """What all layers of a model ask for together."""

    specs: tuple[AttentionSpec, ...]
    dtype: str
    kv_dtype: str
    block_size: int
    deterministic: bool = False
    """What a token gets may depend on nothing but its own sequence, bit for bit: not on the other
    rows, nor on how its sequence was cut into steps."""

    max_len: int | None = None
    """Positions of the longest sequence; None: not known."""

    @property
    def features(self) -> frozenset[str]:
        """What the layers ask for beyond plain causal attention."""
        return frozenset[str]().union(*(spec.features for spec in self.specs))

    @property
    def window(self) -> int | None:
        """The widest window of any layer; None if some layer attends to all positions."""
        windows = [spec.window for spec in self.specs if spec.window is not None]
        return max(windows) if windows and len(windows) == len(self.specs) else None

    @property
    def head_sizes(self) -> frozenset[int]:
        """The head sizes of all layers."""
        return frozenset(spec.head_size for spec in self.specs)


class AttentionBackend(Protocol):
    """One way to attend. Made once per runner, with the device it will work on."""

    name: str

    def refuses(self, need: AttentionNeed) -> str | None:
        """None if it can serve the need, else the reason in one line."""
        ...

    def bytes_per_block(self, spec: AttentionSpec, need: AttentionNeed) -> int:
        """Bytes of one KV block of one layer, as ``allocate`` will take them."""
        ...

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> Array:
        """The layer's cache, in the backend's own layout. Opaque to everybody else."""
        ...

    def plan(self, batch: Batch, need: AttentionNeed) -> object:
        """Metadata of a step, made once and given to ``attend`` for every layer.

        A batch that was padded (``core/buckets.py``) has rows without tokens and tokens of no row:
        what ``attend`` gives for those is void, but it must not change what the others get.
        """
        ...

    def attend(
        self,
        q_THE: Array,
        k_TKE: Array,
        v_TKE: Array,
        cache: Array,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Array, Array]:
        """Write keys and values to the cache, then attend causally.

        Returns:
            The attended values, (T, H, E), and the cache: the same object if it was changed in
            place, a new one on platforms whose arrays cannot be changed.
        """
        ...

    def copy_blocks(self, caches: Sequence[Array], pairs: IntArray) -> Sequence[Array]:
        """Copy whole blocks in every layer; ``pairs`` is (n, 2), (from, to). Returns the caches."""
        ...


@runtime_checkable
class RotaryAttention(Protocol):
    """What a backend may have besides: the op ``rotary_attention`` in fewer passes over memory."""

    def rotary_attend(
        self,
        q_THE: Array,
        k_TKE: Array,
        v_TKE: Array,
        angles: tuple[Array, ...],
        norms: tuple[Array, Array, float] | None,
        cache: Array,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Array, Array]:
        """See ``Ops.rotary_attention``: what it returns, and within the tolerance of ``attend``."""
        ...


@runtime_checkable
class RecordableAttention(Protocol):
    """What a backend has whose steps may be recorded once and replayed with other arrays.

    ``plan`` is then ``device_plan`` over what ``host_plan`` gives. Attending may not look at
    values on the host, nor take memory whose size depends on them: a replay repeats the very
    launches, over the same addresses.
    """

    records_mixed: bool
    """Whether steps in which rows have several tokens can be recorded as well, once padded."""

    def host_plan(self, batch: Batch, need: AttentionNeed) -> tuple[IntArray, ...]:
        """Everything about a step that the backend reads on the device.

        Called once for every step, in order and before the device is given it, replays included:
        a backend that keeps more than these arrays brings it up to date here.

        The sizes of all arrays but the last depend on the step's numbers of tokens and rows alone.
        The last may be of another size in each step, up to what the longest sequences need.
        """
        ...

    def device_plan(self, arrays: Sequence[Any], batch: Batch, need: AttentionNeed) -> object:
        """The plan over those arrays, int32 on the device.

        If the batch has as many tokens as rows, every row decodes: the step may be recorded, and
        others of so many rows be attended with its plan. Where ``records_mixed``, a step of more
        tokens, some of them padding, may be too, for others of so many tokens and rows. Else the
        plan is for this step alone.

        The last array is flat and as long as it can ever be; what the step has is its beginning.
        """
        ...
