from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from dovetail.core.contracts.model import Linear
from dovetail.core.errors import UnsupportedError
from dovetail.quant.int8 import Int8

SCHEME = Int8({})


def weight(rows: int = 7, columns: int = 33) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns), np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_weight_is_within_half_a_step(dtype: type) -> None:
    w = weight(3000, 130).astype(dtype)  # More than fits in a block of rows.
    params = SCHEME.quantize(w)
    assert params["codes"].dtype == np.int8 and params["scales"].dtype == np.float32
    wide = w.astype(np.float32)
    steps = np.abs(wide).max(1, keepdims=True) / 127
    assert (np.abs(SCHEME.reference(params) - wide) <= 0.5001 * steps).all()
    assert (np.abs(params["codes"]).max(1) == 127).all(), "the whole range is used"


def test_the_weight_is_not_written_to() -> None:
    w = weight()
    before = w.copy()
    w.flags.writeable = False
    SCHEME.quantize(w)
    assert np.array_equal(w, before)


def test_a_transposed_weight_is_the_same_weight() -> None:
    w = weight(64, 200)
    params, turned = SCHEME.quantize(w), SCHEME.quantize(np.ascontiguousarray(w.T).T)
    assert all(np.array_equal(params[name], turned[name]) for name in params)


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38])
def test_rows_that_are_too_small_for_a_scale_are_zero(size: float) -> None:
    w = weight()
    w[3] = np.sign(w[3]) * np.float32(size)
    back = SCHEME.reference(SCHEME.quantize(w))
    assert (back[3] == 0).all() and (back[2] != 0).any()


def test_bytes_are_those_of_the_arrays() -> None:
    layer = Linear(sources=("a", "b"), out_features=(4, 3), in_features=33)
    params = SCHEME.quantize(weight())
    assert SCHEME.num_bytes(layer) == sum(array.nbytes for array in params.values())


def test_it_reads_no_quantized_checkpoint() -> None:
    layer = Linear(sources=("a",), out_features=(4,), in_features=8)
    with pytest.raises(UnsupportedError, match="Int8 quantizes weights while it loads them"):
        SCHEME.stored(layer)
