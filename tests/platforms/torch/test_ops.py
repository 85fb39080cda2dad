from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from dovetail.core.contracts.ops import OP_NAMES, OpTable
from dovetail.core.errors import UnsupportedError
from dovetail.platforms.torch.dtypes import TORCH_DTYPES, from_numpy, torch_dtype
from dovetail.platforms.torch.ops import DenseLinear, references

OPS = references()
DTYPES = [torch.float32, torch.bfloat16]


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_every_op_has_a_reference() -> None:
    assert tuple(OPS) == OP_NAMES
    bound = OpTable(OPS).bind()
    assert all(callable(getattr(bound, name)) for name in OP_NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_not_changed_and_dtypes_are_kept(dtype: torch.dtype) -> None:
    x, weight = values(5, 8, dtype=dtype), values(8, dtype=dtype)
    integers = torch.ones(4, 8, dtype=torch.int8), values(4), values(4, dtype=dtype)
    nibbles = torch.ones(4, 32, dtype=torch.uint8), values(4, 1), None
    calls: dict[str, tuple[Any, ...]] = {
        "rms_norm": (x, weight, 1e-6),
        "add_rms_norm": (x, values(5, 8, dtype=dtype), weight, 1e-6),
        "layer_norm": (x, weight, weight, 1e-6),
        "rotary": (values(5, 2, 8, dtype=dtype), values(5, 3), values(5, 3)),
        **dict.fromkeys(("soft_cap", "scale"), (x, 3.0)),
        "add": (x, values(5, 8, dtype=dtype)),
        "linear": (x, DenseLinear(values(4, 8, dtype=dtype), values(4, dtype=dtype))),
        "int8_weight": integers,
        "int8_linear": (x, OPS["int8_weight"](*integers)),
        "int4_weight": nibbles,
        "int4_linear": (values(5, 64, dtype=dtype), OPS["int4_weight"](*nibbles)),
        "embedding": (torch.tensor([1, 2]), x),
        **dict.fromkeys(("silu_and_mul", "gelu_tanh_and_mul", "gelu", "gelu_tanh"), (x,)),
        **dict.fromkeys(("relu", "silu", "all_reduce"), (x,)),
    }
    assert set(calls) == set(OP_NAMES) - {"attention"}
    for name, arguments in calls.items():
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        result = OPS[name](*arguments)
        for output in result if isinstance(result, tuple) else (result,):
            assert name.endswith("_weight") or output.dtype == dtype, name
        for old, new in zip(before, arguments, strict=True):
            if isinstance(old, torch.Tensor):
                assert torch.equal(old, new), name


def test_linear() -> None:
    x, w, b = values(3, 4), values(5, 4, seed=1), values(5, seed=2)
    assert torch.allclose(OPS["linear"](x, DenseLinear(w, b)), x @ w.T + b, atol=1e-6)
    assert torch.allclose(OPS["linear"](x, DenseLinear(w)), x @ w.T, atol=1e-6)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_embedding(ids: torch.dtype) -> None:
    table = values(10, 4)
    assert torch.equal(
        OPS["embedding"](torch.tensor([3, 0, 3], dtype=ids), table), table[[3, 0, 3]]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_that_of_llama(dtype: torch.dtype) -> None:
    x, norm = values(7, 32, dtype=dtype), LlamaRMSNorm(32, eps=1e-5).to(dtype)
    norm.weight.data = values(32, dtype=dtype, seed=1)
    assert torch.equal(OPS["rms_norm"](x, norm.weight, 1e-5), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_a_weight_in_float32_is_that_of_gemma(dtype: torch.dtype) -> None:
    x, norm = values(7, 32, dtype=dtype), Gemma2RMSNorm(32, eps=1e-6).to(dtype)
    norm.weight.data = values(32, dtype=dtype, seed=1)
    assert torch.equal(OPS["rms_norm"](x, norm.weight.float() + 1.0, 1e-6), norm(x))


def test_add_rms_norm() -> None:
    x, residual, weight = values(7, 32), values(7, 32, seed=1), values(32, seed=2)
    normed, total = OPS["add_rms_norm"](x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, OPS["rms_norm"](total, weight, 1e-6))


def test_layer_norm() -> None:
    x, weight, bias = values(4, 16), values(16, seed=1), values(16, seed=2)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert torch.allclose(OPS["layer_norm"](x, weight, None, 1e-5), expected, atol=1e-5)
    assert torch.allclose(OPS["layer_norm"](x, weight, bias, 1e-5), expected + bias, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_is_that_of_llama(dtype: torch.dtype) -> None:
    q, angles = values(6, 3, 8, dtype=dtype), values(6, 4, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    doubled = [torch.cat([part, part], -1) for part in (cos, sin)]
    expected, _ = apply_rotary_pos_emb(q, q, *doubled)
    assert torch.equal(OPS["rotary"](q, cos, sin), expected)


def test_rotary_of_a_part_of_the_head() -> None:
    q, angles = values(6, 3, 8), values(6, 2, seed=1)
    turned = OPS["rotary"](q, angles.cos(), angles.sin())
    assert torch.equal(turned[..., 4:], q[..., 4:])
    assert torch.equal(turned[..., :4], OPS["rotary"](q[..., :4], angles.cos(), angles.sin()))
    assert torch.allclose(turned.norm(dim=-1), q.norm(dim=-1), atol=1e-5)


def scalar(function: Callable[[float], float], x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([function(float(v)) for v in x.flatten()]).reshape(x.shape)


def _tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": _tanh_gelu,
}


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations(name: str) -> None:
    x = values(4, 6)
    assert torch.allclose(OPS[name](x), scalar(ACTIVATIONS[name], x), atol=1e-6)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_gated_activations(name: str) -> None:
    x = values(4, 6)
    expected = OPS[name](x[:, :3]) * x[:, 3:]
    assert torch.allclose(OPS[f"{name}_and_mul"](x), expected, atol=1e-6)


def test_soft_cap() -> None:
    x = values(4, 6) * 10
    expected = scalar(lambda v: 3 * math.tanh(v / 3), x)
    assert torch.allclose(OPS["soft_cap"](x, 3.0), expected, atol=1e-5)


def test_attention_must_be_bound() -> None:
    with pytest.raises(UnsupportedError, match="bound to an attention backend"):
        OPS["attention"](None, None, None, None, None, None)


@pytest.mark.parametrize("name", list(TORCH_DTYPES))
def test_numpy_arrays_become_tensors_without_a_copy(name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    array = np.arange(6).reshape(2, 3).astype(dtype)
    array.flags.writeable = False
    for view in (array, array.T):
        tensor = from_numpy(view)
        assert tensor.dtype == torch_dtype(name) == TORCH_DTYPES[name]
        assert tensor.shape == view.shape
        assert tensor.data_ptr() == array.__array_interface__["data"][0]
        np.testing.assert_array_equal(tensor.float().numpy(), view.astype(np.float32))


def test_scalars_become_tensors() -> None:
    assert from_numpy(np.asarray(2.5, np.float32)).shape == ()


def test_unknown_dtypes() -> None:
    with pytest.raises(UnsupportedError, match="no dtype 'int3'"):
        torch_dtype("int3")
