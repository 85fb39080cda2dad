"""What every scheme computes, on every platform here: its reference's product, and numpy's bits."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from dovetail.core.conformance import numpy_ops
from dovetail.core.contracts.quant import BoundParams, QuantScheme
from dovetail.core.plugins.quant import make_scheme
from dovetail.core.plugins.selection import load_platform

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
OUT, WIDTH, ROWS = 64, 128, 5


def drawn(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("platform", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_layer(name: str, platform: str, dtype: str) -> None:
    scheme, bench = make_scheme(name, {}), load_platform(platform).workbench()
    params = scheme.quantize(drawn(OUT, WIDTH, seed=0))
    x, bias = (drawn(*shape, seed=1).astype(DTYPES[dtype]) for shape in ((ROWS, WIDTH), (OUT,)))
    there = {role: bench.put(array) for role, array in params.items()}
    bound = scheme.bind(bench.ops, there, bench.put(bias))
    got = bench.get(scheme.apply(bench.ops, bench.put(x), bound))
    assert got.dtype == DTYPES[dtype]

    ops = numpy_ops.bind(numpy_ops.attention)
    ours = scheme.apply(ops, x, scheme.bind(ops, params, bias)).astype(np.float32)
    unit = 1e-5 if dtype == "float32" else 2.0**-7
    assert (np.abs(got.astype(np.float32) - ours) <= unit * np.maximum(1, np.abs(ours))).all()

    wide = x.astype(np.float32)
    want = wide @ scheme.reference(params).T + bias.astype(np.float32)
    # Half a step of every input, which add up like a random walk.
    step = np.abs(wide).max(1, keepdims=True) / 127
    spread = step / 12**0.5 * np.linalg.norm(scheme.reference(params), axis=1)
    error = np.abs(ours - want) - unit * np.maximum(1, np.abs(want))
    assert (error <= 5 * spread).all() and (error > 0).any()


class Plain(QuantScheme):
    """The scheme of a package that packs nothing."""

    def num_bytes(self, layer: object) -> int:
        return 0

    def apply(self, ops: object, x: np.ndarray, bound: BoundParams) -> np.ndarray:
        return x @ bound.params["w"].T + bound.bias

    def reference(self, params: object) -> np.ndarray:
        raise AssertionError


def test_a_scheme_that_binds_nothing_gets_its_params() -> None:
    scheme, w, bias = Plain({}), drawn(3, 4, seed=0), drawn(3, seed=1)
    bound = scheme.bind(None, {"w": w}, bias)
    x = drawn(2, 4, seed=2)
    assert np.array_equal(scheme.apply(None, x, bound), x @ w.T + bias)
    assert scheme.for_layer("anything", None) is scheme
