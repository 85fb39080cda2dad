"""The oracle: the models of ``core/models`` on numpy ops, with keys and values in plain lists."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dovetail.core.conformance.numpy_ops import (
    NUMPY_DTYPES,
    DenseWeight,
    NumpyArray,
    bind,
    dense_attention,
)
from dovetail.core.conformance.sampler import choose, log_softmax
from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Constant, Linear, Model, StepInputs, Tensor
from dovetail.core.contracts.quant import QuantScheme
from dovetail.core.models.weights import (
    Leaf,
    Source,
    align,
    assemble,
    check,
    fill,
    leaves,
    needs,
    open_checkpoint,
)
from dovetail.core.request import SamplingParams
from dovetail.core.types import FloatArray

__all__ = ["Oracle", "Told", "Wish"]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One request, as the oracle needs it."""

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    mask: Callable[[int], Collection[int]] | None = None
    """The tokens that a grammar allows after so many were generated; None: there is no grammar."""


@dataclass(kw_only=True)
class Told:
    """What the oracle says of a request."""

    token_ids: list[int] = field(default_factory=list)
    logits: list[FloatArray] = field(default_factory=list)
    """(V,) of each place that got a token."""
    prompt_logits: FloatArray
    """(L, V) of the prompt's positions."""

    def logprobs(self) -> npt.NDArray[np.float64]:
        """(n, V) of the places that got a token."""
        return log_softmax(np.stack(self.logits))

    def margins(self) -> FloatArray:
        """(n,) by how much the likeliest token's logit is above the next one's."""
        top = np.partition(np.stack(self.logits), -2, axis=-1)[:, -2:]
        gaps: FloatArray = top[:, 1] - top[:, 0]
        return gaps


class _Segment(NamedTuple):
    """Tokens of one sequence among those of a step."""

    sequence: int
    start: int
    end: int


_Cache = list[tuple[NumpyArray, NumpyArray]]
"""Keys and values, (L, K, E), of each sequence in one layer."""


class Oracle:
    """A model in float32 weights, computed in float64 and rounded to float32 after each op.

    Args:
        model: The definition.
        source: Its tensors.
        weight_dtype: What they are rounded to before anything is computed with them.
        scheme: What linear layers are quantized with.
    """

    def __init__(
        self,
        model: Model,
        source: Source,
        *,
        weight_dtype: str = "float32",
        scheme: QuantScheme | None = None,
    ) -> None:
        self._model = model
        tree, dtype = model.weights(), NUMPY_DTYPES[weight_dtype]
        self._ops = bind(_attend)
        bound: dict[str, Any] = {}
        for path, leaf in leaves(tree):
            weight, bias = _arrays(leaf, source, dtype)
            if not isinstance(leaf, Linear):
                bound[path] = weight
                continue
            own = scheme.for_layer(path, leaf) if scheme else None
            if own is None or own.refuses(path, leaf):
                bound[path] = DenseWeight(weight, bias)
            else:
                bound[path] = _quantized(own, self._ops, weight, bias)
        self._weights = fill(tree, bound)

    @classmethod
    def open(
        cls,
        folder: Path,
        model: Model,
        *,
        weight_dtype: str = "float32",
        scheme: QuantScheme | None = None,
    ) -> Oracle:
        """From a checkpoint. Raises CheckpointError if it is not the model's."""
        source = align(open_checkpoint(folder), model.weights())
        check(needs(model.weights()), source, model.ignored)
        return cls(model, source, weight_dtype=weight_dtype, scheme=scheme)

    def tell(self, wishes: Sequence[Wish]) -> list[Told]:
        """Answer every wish to the end of its ``max_tokens``; stop tokens end nothing."""
        caches = self._empty(len(wishes))
        hidden = self._step([wish.prompt for wish in wishes], [0] * len(wishes), caches)
        told = [Told(prompt_logits=self._logits(part)) for part in hidden]
        logits = [answer.prompt_logits[-1] for answer in told]
        for _ in range(max(wish.params.max_tokens or 0 for wish in wishes)):
            for wish, answer, row in zip(wishes, told, logits, strict=True):
                _answer(wish, answer, row)
            lengths = [len(caches[0][i][0]) for i in range(len(wishes))]
            hidden = self._step([[answer.token_ids[-1]] for answer in told], lengths, caches)
            logits = list(self._logits(np.concatenate(hidden)))
        for wish, answer in zip(wishes, told, strict=True):
            del answer.token_ids[wish.params.max_tokens :]
            del answer.logits[wish.params.max_tokens :]
        return told

    def logits_of(self, token_ids: Sequence[int]) -> FloatArray:
        """(L, V) of a whole sequence."""
        return self._logits(self._step([token_ids], [0], self._empty(1))[0])

    def _empty(self, num_sequences: int) -> list[_Cache]:
        return [
            [(np.zeros((0, s.num_kv_heads, s.head_size), np.float32),) * 2] * num_sequences
            for s in self._model.attention_specs()
        ]

    def _step(
        self, tokens: Sequence[Sequence[int]], starts: Sequence[int], caches: list[_Cache]
    ) -> list[NumpyArray]:
        """Hidden states of each sequence's new tokens; the caches grow by them."""
        ends = np.cumsum([len(new) for new in tokens]).tolist()
        plan = [
            _Segment(i, end - len(new), end)
            for i, (end, new) in enumerate(zip(ends, tokens, strict=True))
        ]
        positions = np.concatenate(
            [np.arange(a, a + len(new)) for a, new in zip(starts, tokens, strict=True)]
        )
        inputs = StepInputs(
            token_ids_T=np.concatenate([np.array(new, np.int64) for new in tokens]),
            positions_T=self._model.positions(positions.astype(np.int32)),
            plan=plan,
        )
        hidden, written = self._model.forward(self._ops, self._weights, inputs, caches)
        caches[:] = written
        return [hidden[start:end] for _, start, end in plan]

    def _logits(self, hidden_ND: NumpyArray) -> FloatArray:
        logits: FloatArray = self._model.logits(self._ops, self._weights, hidden_ND)
        return logits


def _answer(wish: Wish, answer: Told, logits_V: FloatArray) -> None:
    token = choose(
        logits_V,
        wish.params,
        prompt=wish.prompt,
        output=answer.token_ids,
        seed=wish.seed,
        stop_token_ids=wish.stop_token_ids,
        mask=None if wish.mask is None else wish.mask(len(answer.token_ids)),
    )
    answer.logits.append(logits_V)
    answer.token_ids.append(token)


def _arrays(
    leaf: Leaf, source: Source, dtype: np.dtype[Any]
) -> tuple[NumpyArray, NumpyArray | None]:
    """Weight and bias, rounded as runners do: all but tables, and weights with an offset."""
    parts = assemble(leaf, source)
    exact = isinstance(leaf, Constant) or (isinstance(leaf, Tensor) and bool(leaf.offset))
    kept = np.dtype(np.float32) if exact else dtype
    weights = [array.astype(kept).astype(np.float32) for array in parts.weights]
    biases = [array.astype(dtype).astype(np.float32) for array in parts.biases]
    weight = weights[0] if len(weights) == 1 else np.concatenate(weights)
    return weight, np.concatenate(biases) if biases else None


def _quantized(
    scheme: QuantScheme, ops: Any, weight: NumpyArray, bias: NumpyArray | None
) -> Callable[[NumpyArray], NumpyArray]:
    """A layer whose weight is quantized, as the op ``linear`` takes it."""
    bound = scheme.bind(ops, scheme.quantize(weight), bias)
    return lambda x: scheme.apply(ops, x, bound)


def _attend(
    q_THE: NumpyArray,
    k_TKE: NumpyArray,
    v_TKE: NumpyArray,
    cache: _Cache,
    plan: Sequence[_Segment],
    spec: AttentionSpec,
) -> tuple[NumpyArray, _Cache]:
    """Every segment appends to its sequence, then attends to all of it."""
    grown, parts = list(cache), []
    for sequence, start, end in plan:
        old_k, old_v = cache[sequence]
        k = np.concatenate([old_k, k_TKE[start:end]])
        v = np.concatenate([old_v, v_TKE[start:end]])
        grown[sequence] = (k, v)
        parts.append(dense_attention(q_THE[start:end], k, v, spec))
    return np.concatenate(parts), grown
