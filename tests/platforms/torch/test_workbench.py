from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from dovetail.attention_backends.reference import ReferenceAttention
from dovetail.core.plugins.selection import load_platform
from tests.attention_backends.sequences import make_need, make_spec

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int64, np.int8]


@pytest.fixture(scope="module")
def bench() -> Any:
    return load_platform("reference").workbench()


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_go_there_and_back(bench: Any, dtype: Any) -> None:
    array = np.arange(-3, 9).reshape(3, 4).astype(dtype)
    there = bench.put(array)
    back = bench.get(there.t())
    assert back.dtype == array.dtype
    assert np.array_equal(back.view(np.uint8).view(array.dtype), array.T)
    there.zero_()
    assert array.any(), "the device has memory of its own"


def test_layers_are_bound_as_models_get_them(bench: Any) -> None:
    weight, bias = np.eye(3, 5, dtype=np.float32), np.ones(3, np.float32)
    layer = bench.bind_linear(bench.put(weight), bench.put(bias))
    x = np.arange(10, dtype=np.float32).reshape(2, 5)
    assert np.array_equal(bench.get(bench.ops.linear(bench.put(x), layer)), x[:, :3] + 1)


def test_overrides_are_in_the_table() -> None:
    platform = load_platform("cpu")
    platform.override_ops = lambda table: table.override("relu", torch.neg, origin="test 1")  # type: ignore[attr-defined]
    bench = platform.workbench()
    assert list(bench.overrides) == ["relu"]
    assert bench.get(bench.ops.relu(bench.put(np.ones(1, np.float32)))).tolist() == [-1]


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_bytes_of_a_cache_are_those_that_were_promised(bench: Any, kv_dtype: str) -> None:
    spec = make_spec()
    need, backend = make_need(spec, kv_dtype=kv_dtype), ReferenceAttention(torch.device("cpu"))
    cache = backend.allocate(spec, need, 7)
    assert bench.num_bytes(cache) == 7 * backend.bytes_per_block(spec, need)


def test_shared_memory_counts_once(bench: Any) -> None:
    x = torch.zeros(4, 4)
    assert bench.num_bytes([x, {"a": x[1:]}, (x.t(),)]) == 64
