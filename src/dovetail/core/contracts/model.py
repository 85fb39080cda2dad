"""The model contract: one definition for every platform, over the op table.

A model imports neither torch nor jax. It declares its parameters and is a function of arrays that
it never looks into. Offered through the entry-point group ``dovetail.models``: the entry point's
name is the architecture (``LlamaForCausalLM``), its value the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.ops import Ops
from dovetail.core.types import Array, IntArray

__all__ = ["Constant", "Linear", "Model", "StepInputs", "Tensor", "WeightTree"]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A parameter used as it is: a norm's weight, an embedding table."""

    source: str
    """Its name in the checkpoint."""
    shape: tuple[int, ...]
    split: int | None = None
    """The axis that tensor parallelism splits; None: every device has all of it."""
    offset: float = 0.0
    """Added to every entry at load (Gemma stores norm weights less one). In float32."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """The weight, and perhaps bias, of a linear layer: W (out, in). The runner binds it once.

    Several checkpoint tensors, one below the other, may make one layer (q, k, v; gate, up).
    """

    sources: tuple[str, ...]
    """Checkpoint names of the weights, in order of output rows."""
    out_features: tuple[int, ...]
    """Output rows of each source; if there is one source, of each part fused in it (q, k, v)."""
    in_features: int
    bias_sources: tuple[str, ...] = ()
    """Checkpoint names of the biases, one per source; empty: no bias."""
    split: Literal["out", "in"] | None = None
    """The axis that tensor parallelism splits: ``out`` within each entry of ``out_features``;
    ``in`` is followed by an all-reduce, so that only one device may add the bias."""
    transposed: bool = False
    """The checkpoint stores W as (in, out), as GPT-2 does."""
    tied_to: str | None = None
    """Path in the tree of the embedding whose table this weight is, such as ``embed``."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A table that is computed, not read: rotary cosines and sines. float32 until it is bound."""

    make: Callable[[], np.ndarray[Any, np.dtype[np.float32]]]


WeightTree = dict[str, Any]
"""Nested dicts and lists whose leaves are Tensor, Linear or Constant; after loading, arrays."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What a model reads of a step, as arrays of the platform."""

    token_ids_T: Array
    """Whole numbers of 32 or 64 bits, and the positions alike."""
    positions_T: Array
    plan: object
    """The attention backend's metadata, handed through."""
    wanted: Array | None = None
    """(W,) indices of the tokens whose hidden states are wanted, in any order; None: all are."""


class Model(ABC):
    """A decoder. Built from the checkpoint's config; holds no arrays."""

    ignored: ClassVar[tuple[str, ...]] = (r".*\.rotary_emb\.inv_freq",)
    """Regular expressions of checkpoint tensors that may be there and are not used."""

    narrows: ClassVar[bool] = False
    """``forward`` heeds ``StepInputs.wanted``, which is None for models that do not say so."""
    vocab_size: int
    """Width of the logits."""
    max_positions: int
    """Longest sequence that the checkpoint was made for (``max_position_embeddings``)."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], *, max_model_len: int) -> Model:
        """Read the checkpoint's config. Raises UnsupportedError for a setting it cannot honour."""

    @abstractmethod
    def weights(self) -> WeightTree:
        """Declaration of every parameter."""

    @abstractmethod
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """One per layer, in order."""

    @abstractmethod
    def forward(
        self, ops: Ops, weights: Mapping[str, Any], inputs: StepInputs, caches: Sequence[Array]
    ) -> tuple[Array, list[Array]]:
        """Hidden states after the last norm, (T, D) or of the wanted tokens, and the caches."""

    @abstractmethod
    def logits(self, ops: Ops, weights: Mapping[str, Any], hidden_ND: Array) -> Array:
        """Logits of chosen rows, (N, V)."""

    def positions(self, positions_T: IntArray) -> IntArray:
        """Positions as the model counts them. Default: from 0 (OPT starts at 2)."""
        return positions_T
