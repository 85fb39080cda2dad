"""The shared vocabulary of dtypes and shapes.

Array names may end in a shape suffix, one letter per axis:

==  =========================================================================
T   tokens of one step, all requests one after another (no padding)
R   requests (rows) that take part in one step
S   rows that get a token in this step
G   places that get a token: one per sampled row, and one per draft
D   hidden size                         V   vocabulary size
H   query heads                         K   key and value heads
E   head size                           L   positions of one sequence
B   KV blocks of the pool               P   positions in one KV block
M   KV blocks of the longest row        N   rows of logits
==  =========================================================================

``q_THE`` is an array of query vectors with shape (tokens, heads, head size).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "BoolArray", "DType", "FloatArray", "IndexArray", "IntArray", "ITEM_SIZE"]

DType: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""The dtypes that weights and activations can have, by the names that checkpoints use."""

ITEM_SIZE: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per element of each dtype."""

Array: TypeAlias = Any
"""An array of the platform: a torch tensor, a JAX array, the vendor's own. Stays in the runner."""

IntArray: TypeAlias = npt.NDArray[np.int32]
IndexArray: TypeAlias = npt.NDArray[np.intp]
"""What other arrays are indexed with: numpy would convert anything else, each time."""
FloatArray: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
