"""Fused ops against the torch references, over shapes, dtypes and strides.

Results are within the tolerance of the conformance kit. The interpreter cuts bfloat16 off where
devices round it: that is twice as far.
"""

import subprocess
import sys

import pytest
import torch

from dovetail.core.conformance.tolerances import op_tolerance
from dovetail.core.contracts.ops import OpTable
from dovetail.core.errors import UnsupportedError
from dovetail.platforms.gpu.ops import override_ops
from dovetail.platforms.torch.ops import references
from tests.platforms.gpu.ops.devices import DEVICE, INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("rms_norm", "add_rms_norm", "layer_norm", "rotary", "silu_and_mul", "gelu_tanh_and_mul")


@pytest.fixture(scope="module")
def table():
    table = OpTable(references())
    override_ops(table, "tests 1")
    return table


def values(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def compare(table, name, *arguments):
    """The override's results, which must be near the reference's and leave the arguments alone."""
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    wanted = table.references[name](*arguments)
    got = table.overrides[name].function(*arguments)
    for ours, theirs in zip(_many(got), _many(wanted), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert ours.is_contiguous()
        allowed = op_tolerance(name, str(ours.dtype).removeprefix("torch."), None)
        if INTERPRETED and ours.dtype == torch.bfloat16:
            allowed *= 2
        error = (ours.double() - theirs.double()).abs() / theirs.double().abs().clamp(min=1)
        assert not error.numel() or error.max() <= allowed
    for old, argument in zip(before, arguments, strict=True):
        if isinstance(argument, torch.Tensor) and argument.numel():
            assert torch.equal(old, argument)
            assert all(r.data_ptr() != argument.data_ptr() for r in _many(got))
    return got


def _many(results):
    return results if isinstance(results, tuple) else (results,)


def test_the_table_has_every_fused_op(table):
    assert tuple(table.overrides) == NAMES
    assert all(op.origin == "tests 1" for op in table.overrides.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (1, 1), (3, 64), (2, 3, 33), (2, 2, 3, 128), (7, 4099)])
def test_norms(table, shape, dtype):
    x, residual = values(*shape, dtype=dtype), values(*shape, dtype=dtype, seed=1)
    for weight in (values(shape[-1], dtype=dtype, seed=2), values(shape[-1], seed=3)):
        compare(table, "rms_norm", x, weight, 1e-6)
        compare(table, "add_rms_norm", x, residual, weight, 1e-5)
        compare(table, "layer_norm", x, weight, None, 1e-5)
        compare(table, "layer_norm", x, weight, values(shape[-1], dtype=dtype, seed=4), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_rotary_read_heads_where_they_are(table, dtype):
    tokens, heads, keys, entries = 5, 6, 2, 48
    buffer = values(tokens, (heads + 2 * keys) * entries, dtype=dtype)
    q, k, _ = buffer.split([heads * entries, keys * entries, keys * entries], dim=-1)
    weight = values(entries, dtype=dtype, seed=1)
    cos, sin = values(tokens, 24, seed=2), values(tokens, 24, seed=3)
    for x in (q.view(tokens, heads, entries), k.view(tokens, keys, entries)):
        compare(table, "rms_norm", x, weight, 1e-6)
        compare(table, "layer_norm", x, weight, weight, 1e-6)
        compare(table, "add_rms_norm", x, x.flip(0), weight, 1e-6)
        compare(table, "rotary", x, cos, sin)


def test_rows_are_found_without_a_copy():
    from dovetail.platforms.gpu.ops.rows import Rows

    buffer = values(4, 100)
    heads = buffer[:, 20:60].view(4, 5, 8)
    for x in (buffer, buffer[:, :30], heads, heads[:, 1:3], buffer.view(2, 2, 10, 10)):
        rows = Rows.of(x)
        assert rows.tensor.data_ptr() == x.data_ptr()
        for r in range(len(rows)):
            outer, inner = rows.steps
            start = (r // rows.inner) * outer + (r % rows.inner) * inner
            flat = torch.as_strided(
                buffer, (rows.width,), (1,), rows.tensor.storage_offset() + start
            )
            assert torch.equal(flat, x.reshape(-1, rows.width)[r])
    turned = buffer.t()
    assert torch.equal(Rows.of(turned).tensor[:, 0], turned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "entries", "half"), [(1, 64, 32), (3, 67, 30), (33, 8, 1)])
def test_rotary(table, heads, entries, half, dtype):
    x = values(7, heads, entries, dtype=dtype)
    cos, sin = values(7, half, seed=1), values(7, half, seed=2)
    compare(table, "rotary", x, cos, sin)
    compare(table, "rotary", x, cos.to(dtype), sin.to(dtype))
    both = values(7, 2 * half, seed=3)
    compare(table, "rotary", x, both[:, :half], both[:, half:])


def test_rotary_leaves_what_is_beyond_the_pairs(table):
    x = values(3, 2, 20, dtype=torch.bfloat16)
    got = compare(table, "rotary", x, values(3, 6, seed=1), values(3, 6, seed=2))
    assert torch.equal(got[..., 12:], x[..., 12:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 66), (2, 3, 50), (2, 2, 2, 10), (2, 5000)])
def test_gates(table, shape, dtype):
    x = 4 * values(*shape, dtype=dtype)
    compare(table, "silu_and_mul", x)
    compare(table, "gelu_tanh_and_mul", x)
    wide = 4 * values(*shape[:-1], shape[-1] + 7, dtype=dtype)
    compare(table, "silu_and_mul", wide[..., 3 : 3 + shape[-1]])


def test_gates_of_large_inputs_do_not_overflow(table):
    x = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    for name in ("silu_and_mul", "gelu_tanh_and_mul"):
        assert compare(table, name, x).tolist() == [[0.0, 0.0, 0.0, 200.0, 1e4]]


def test_no_rows(table):
    none, heads = values(0, 16), values(0, 2, 16)
    weight = values(16)
    compare(table, "rms_norm", none, weight, 1e-6)
    compare(table, "add_rms_norm", none, none, weight, 1e-6)
    compare(table, "layer_norm", none, weight, None, 1e-6)
    compare(table, "rotary", heads, values(0, 8), values(0, 8))
    compare(table, "silu_and_mul", none)


def test_rows_that_are_too_long_are_refused(table):
    x = torch.zeros(1, (1 << 15) + 1, device=DEVICE)
    with pytest.raises(UnsupportedError, match="32769 entries"):
        table.overrides["rms_norm"].function(x, x[0], 1e-6)


def test_importing_the_package_does_not_import_triton():
    code = "import sys, dovetail.platforms.gpu.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
