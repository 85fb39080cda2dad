"""From a declaration of weights to numpy arrays: matched with a checkpoint, checked, assembled.

A runner loads like this::

    source = align(open_checkpoint(folder), tree)        # or Dummy(tree, dtype, seed)
    check(needs(tree), source, model.ignored)
    arrays = {path: bind(assemble(leaf, source)) for path, leaf in leaves(tree)}
    weights = fill(tree, arrays)
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from dovetail.core.contracts.model import Constant, Linear, Tensor, WeightTree
from dovetail.core.contracts.quant import QuantParams, QuantScheme
from dovetail.core.errors import CheckpointError, UnsupportedError
from dovetail.core.models.checkpoint import Checkpoint, open_checkpoint

__all__ = [
    "Checkpoint",
    "Dummy",
    "Leaf",
    "Parts",
    "QuantizedWeight",
    "Source",
    "align",
    "assemble",
    "check",
    "fill",
    "leaf_needs",
    "leaves",
    "needs",
    "open_checkpoint",
]

NumpyArray = np.ndarray[Any, Any]
Leaf = Tensor | Linear | Constant
_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_SHOWN = 10


class Source(Protocol):
    """Tensors by name: a ``Checkpoint``, or a ``Dummy``."""

    shapes: dict[str, tuple[int, ...]]
    """Every tensor that there is."""
    total_bytes: int
    """Of all tensors together."""

    def tensor(self, name: str) -> NumpyArray:
        """One tensor; it must not be written to."""
        ...

    def read_ahead(self, name: str) -> None:
        """Start reading a tensor that will be wanted soon, without waiting. Only a hint."""
        ...


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """What stands for the weight of a layer."""

    scheme: QuantScheme
    """The layer's own: what ``QuantScheme.for_layer`` says."""
    params: QuantParams


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The arrays of one leaf. They must not be written to: most are views of a file."""

    weights: tuple[NumpyArray, ...]
    """One per source; of a Linear (rows, in), to be joined one below the other if several."""
    biases: tuple[NumpyArray, ...] = ()
    """(rows,) per source, or none at all."""
    quantized: QuantizedWeight | None = None
    """In place of ``weights``, of which there are none then."""

    @property
    def num_bytes(self) -> int:
        """Of all arrays together."""
        params = self.quantized.params if self.quantized else {}
        arrays = (*self.weights, *self.biases, *params.values())
        return sum(array.nbytes for array in arrays)


def leaves(tree: WeightTree) -> Iterator[tuple[str, Leaf]]:
    """Every leaf with its path: keys and indices joined by dots, ``layers.0.mlp.down``."""
    yield from _walk(tree, ())


def fill(tree: WeightTree, bound: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with each leaf replaced by what ``bound`` has for its path."""

    def filled(node: Any, path: tuple[str, ...]) -> Any:
        if isinstance(node, dict):
            return {key: filled(child, (*path, key)) for key, child in node.items()}
        if isinstance(node, list):
            return [filled(child, (*path, str(i))) for i, child in enumerate(node)]
        return bound[".".join(path)]

    return {key: filled(child, (key,)) for key, child in tree.items()}


def assemble(leaf: Leaf, source: Source) -> Parts:
    """The arrays that make up a leaf, without copies but for an offset.

    A transposed Linear comes as (out, in) all the same, as a transposed view. A tied one comes as
    the embedding's table. A Tensor with an offset comes as float32, whatever the source has.
    """
    match leaf:
        case Constant():
            return Parts(weights=(leaf.make(),))
        case Tensor():
            array = source.tensor(leaf.source)
            if leaf.offset:
                array = array.astype(np.float32) + np.float32(leaf.offset)
            return Parts(weights=(array,))
        case Linear():
            arrays = [source.tensor(name) for name in leaf.sources]
            return Parts(
                weights=tuple(array.T if leaf.transposed else array for array in arrays),
                biases=tuple(source.tensor(name) for name in leaf.bias_sources),
            )


def align(checkpoint: Checkpoint, tree: WeightTree) -> Checkpoint:
    """The checkpoint under the names that the tree uses.

    Checkpoints saved from the model without its head lack the first parts of each name:
    ``h.0.ln_1.weight`` for ``transformer.h.0.ln_1.weight``. Of the beginnings of the tree's names,
    of at most two parts, the one is put in front that finds the most tensors; none if none helps.
    """
    held = checkpoint.shapes
    wanted = [name for name in needs(tree) if name not in held]
    starts = {".".join(name.split(".")[:parts]) + "." for name in wanted for parts in (1, 2)}

    def found(start: str) -> dict[str, str]:
        return {
            name.removeprefix(start): name
            for name in wanted
            if name.startswith(start) and name.removeprefix(start) in held
        }

    best: dict[str, str] = max(map(found, sorted(starts)), key=len, default={})
    return checkpoint.renamed(best) if best else checkpoint


def check(needs: Mapping[str, tuple[int, ...]], checkpoint: Source, ignored: Sequence[str]) -> None:
    """Compare what a model needs with what there is.

    Args:
        needs: Every tensor and its shape.
        checkpoint: The tensors.
        ignored: Regular expressions of tensors that may be there and are not used.

    Raises:
        CheckpointError: One, naming every tensor that is missing, not known or of a wrong shape.
    """
    held = checkpoint.shapes
    skip = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    problems = {
        "lacks": [f"{name} {shape}" for name, shape in needs.items() if name not in held],
        "has, unknown to the model,": [
            name for name in held if name not in needs and not skip.fullmatch(name)
        ],
        "has, of a wrong shape,": [
            f"{name} {held[name]} instead of {shape}"
            for name, shape in needs.items()
            if held.get(name, shape) != shape
        ],
    }
    lines = [f"It {what} {_listed(names)}." for what, names in problems.items() if names]
    if lines:
        raise CheckpointError(
            "The checkpoint does not fit its config.json. " + " ".join(lines) + " Is config.json "
            "the one that came with the weights?"
        )


class Dummy:
    """Made-up weights, the same for the same seed: small around 0, norm weights around 1.

    A tensor is cut from one pool of random numbers at a place that its name decides, so a large
    model costs no more than copying memory.

    Args:
        tree: The declaration of the weights.
        dtype: Of all tensors: ``float32``, ``float16`` or ``bfloat16``.
        seed: Another seed gives other weights.

    Raises:
        UnsupportedError: Another dtype.
    """

    _POOL = 1_048_573  # Prime, so that the rows of a large matrix differ.
    _STD = 0.02

    def __init__(self, tree: WeightTree, dtype: str, seed: int = 0) -> None:
        if dtype not in _NUMPY_DTYPES:
            known = ", ".join(_NUMPY_DTYPES)
            raise UnsupportedError(f"Dummy weights cannot be {dtype!r}; allowed: {known}.")
        self._dtype = _NUMPY_DTYPES[dtype]
        self._seed = seed
        self._centres = {
            leaf.source: 1.0 - leaf.offset
            for _, leaf in leaves(tree)
            if isinstance(leaf, Tensor) and len(leaf.shape) == 1 and "bias" not in leaf.source
        }
        pool = np.random.default_rng(seed).standard_normal(self._POOL, np.float32)
        scaled = (pool * np.float32(self._STD)).astype(self._dtype)
        self._pool = np.concatenate([scaled, scaled])
        self._pool.flags.writeable = False
        self.shapes: dict[str, tuple[int, ...]] = needs(tree)
        self.total_bytes = sum(map(math.prod, self.shapes.values())) * self._dtype.itemsize

    def tensor(self, name: str) -> NumpyArray:
        """One tensor. Raises CheckpointError if the tree does not declare it."""
        if name not in self.shapes:
            raise CheckpointError(f"The model declares no tensor {name!r}.")
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        start = int.from_bytes(digest[:8], "little") % self._POOL
        values = self._cut(start, self.shapes[name])
        centre = self._centres.get(name, 0.0)
        return values + self._dtype.type(centre) if centre else values

    def read_ahead(self, name: str) -> None:
        """Nothing to do: there is no file."""

    def _cut(self, start: int, shape: tuple[int, ...]) -> NumpyArray:
        count = math.prod(shape)
        if count <= self._POOL:
            return self._pool[start : start + count].reshape(shape)
        return np.resize(self._pool[start : start + self._POOL], shape)


def _walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Leaf]]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _walk(child, (*path, key))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _walk(child, (*path, str(index)))
    else:
        yield ".".join(path), node


def needs(tree: WeightTree) -> dict[str, tuple[int, ...]]:
    """Every tensor that a tree names, with the shape that the checkpoint must have."""
    return {name: shape for _, leaf in leaves(tree) for name, shape in leaf_needs(leaf)}


def leaf_needs(leaf: Leaf) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that an unquantized leaf is made of, with their shapes in the checkpoint."""
    if isinstance(leaf, Tensor):
        yield leaf.source, leaf.shape
    elif isinstance(leaf, Linear):
        # One source may hold several parts, as a fused q, k, v does.
        whole = len(leaf.sources) == 1
        rows = (sum(leaf.out_features),) if whole else leaf.out_features
        for name, count in zip(leaf.sources, rows, strict=True):
            shape = (count, leaf.in_features)
            yield name, shape[::-1] if leaf.transposed else shape
        if leaf.bias_sources:
            for name, count in zip(leaf.bias_sources, rows, strict=True):
                yield name, (count,)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {noun}: {', '.join(names[:_SHOWN])}{more}"
