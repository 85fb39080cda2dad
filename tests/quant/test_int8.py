from __future__ import annotations

import numpy as np
import pytest

from dovetail.core.contracts.model import Linear
from dovetail.core.errors import UnsupportedError
from dovetail.core.plugins.selection import load_platform
from dovetail.quant.int8 import Int8

SCHEME = Int8({})


def weight(rows: int = 7, columns: int = 33) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns), np.float32)


def test_every_weight_is_within_half_a_step() -> None:
    w = weight()
    params = SCHEME.quantize(w)
    assert params["codes"].dtype == np.int8 and params["scales"].dtype == np.float32
    steps = np.abs(w).max(1, keepdims=True) / 127
    assert (np.abs(SCHEME.reference(params) - w) <= 0.5001 * steps).all()
    assert (np.abs(params["codes"]).max(1) == 127).all(), "the whole range is used"


def test_rows_of_zeros_stay_zero() -> None:
    w = weight()
    w[3] = 0
    assert (SCHEME.reference(SCHEME.quantize(w))[3] == 0).all()


@pytest.mark.parametrize("platform", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes_what_its_reference_stands_for(platform: str, dtype: str) -> None:
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    bench = load_platform(platform).workbench()
    params = SCHEME.quantize(weight(64, 96))
    x = np.random.default_rng(1).standard_normal((5, 96), np.float32).astype(kind)
    there = {name: bench.put(array) for name, array in params.items()}
    got = bench.get(SCHEME.apply(bench.ops, bench.put(x), there))
    want = x.astype(np.float32) @ SCHEME.reference(params).T
    assert got.dtype == kind
    assert np.allclose(got.astype(np.float32), want, atol=1e-4 if dtype == "float32" else 0.15)


def test_bytes_are_those_of_the_arrays() -> None:
    layer = Linear(sources=("a", "b"), out_features=(4, 3), in_features=33)
    params = SCHEME.quantize(weight())
    assert SCHEME.num_bytes(layer) == sum(array.nbytes for array in params.values())


def test_it_reads_no_quantized_checkpoint() -> None:
    layer = Linear(sources=("a",), out_features=(4,), in_features=8)
    with pytest.raises(UnsupportedError, match="Int8 quantizes weights while it loads them"):
        SCHEME.stored(layer)
