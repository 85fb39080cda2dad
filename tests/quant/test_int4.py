from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from dovetail.core.contracts.model import Linear
from dovetail.quant.int4 import Int4
from dovetail.quant.int8 import Int8

SCHEME = Int4({})
LAYER = Linear(sources=("a", "b"), out_features=(4, 3), in_features=192)


def weight(rows: int = 7, columns: int = 192) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns), np.float32)


def furthest(w: np.ndarray) -> np.ndarray:
    """Of each group the largest magnitude, (out, groups)."""
    return np.abs(w.reshape(len(w), -1, 64)).max(2)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_weight_is_within_half_a_step_or_one_where_seven_is_the_end(dtype: type) -> None:
    w = weight(2000).astype(dtype)
    params = SCHEME.quantize(w)
    assert params["codes"].dtype == np.uint8 and params["scales"].dtype == np.float32
    wide, back = w.astype(np.float32), SCHEME.reference(params)
    steps = (furthest(wide) / 8).repeat(64, axis=1)
    at_end = wide / params["scales"].repeat(64, axis=1) > 7
    assert (np.abs(back - wide)[~at_end] <= 0.5001 * steps[~at_end]).all()
    assert (np.abs(back - wide)[at_end] <= 1.0001 * steps[at_end]).all()


def test_the_furthest_entry_of_a_group_is_exact() -> None:
    w = weight(50)
    back = SCHEME.reference(SCHEME.quantize(w))
    is_furthest = np.abs(w) == furthest(w).repeat(64, axis=1)
    assert is_furthest.sum() == 150
    assert np.allclose(back[is_furthest], w[is_furthest], rtol=1e-6)


def test_errors_are_smaller_than_with_sevenths() -> None:
    w = weight(500)
    steps = (furthest(w) / 7).repeat(64, axis=1)
    sevenths = np.rint(w / steps) * steps
    back = SCHEME.reference(SCHEME.quantize(w))
    assert ((back - w) ** 2).sum() < 0.85 * ((sevenths - w) ** 2).sum()


def test_bytes_hold_neighbours_the_first_one_low() -> None:
    w = np.zeros((1, 64), np.float32)
    w[0, :4] = [-8, 7, 3, -1]
    codes = SCHEME.quantize(w)["codes"]
    assert codes[0, :3].tolist() == [0 | 15 << 4, 11 | 7 << 4, 8 | 8 << 4]


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-39])
def test_groups_that_are_too_small_for_a_scale_are_zero(size: float) -> None:
    w = weight()
    w[3, 64:128] = np.sign(w[3, 64:128]) * np.float32(size)
    back = SCHEME.reference(SCHEME.quantize(w))
    assert (back[3, 64:128] == 0).all() and (back[3, :64] != 0).any()


def test_bytes_are_those_of_the_arrays() -> None:
    params = SCHEME.quantize(weight())
    assert SCHEME.num_bytes(LAYER) == sum(array.nbytes for array in params.values())


def test_widths_that_make_no_groups_are_refused_with_the_reason() -> None:
    odd = Linear(sources=("a",), out_features=(4,), in_features=96)
    assert SCHEME.refuses("layers.0.mlp.down", LAYER) is None
    assert SCHEME.refuses("layers.0.mlp.down", odd) == "it has 96 inputs, no multiple of 64"


def test_the_output_layer_has_8_bits() -> None:
    assert isinstance(SCHEME.for_layer("lm_head", LAYER), Int8)
    assert SCHEME.for_layer("layers.0.mlp.down", LAYER) is SCHEME
