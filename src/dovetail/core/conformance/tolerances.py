"""How far a platform may be from the numpy reference. Data; read before you argue with a check.

A value may be off by the tolerance times the larger of 1 and the reference's magnitude. Inputs are
drawn so that values are near 1.

How the figures were chosen: the reference rounds an exact result once. A platform that computes in
float32 and rounds once is off by at most one unit in the last place, which is 2**-7 of values just
above 1 in bfloat16 and 2**-10 in float16; rounding on the way, as some kernels do, costs one more.
So elementwise ops get two units, and so do linear layers over integers, whose sums are exact. Norms
and other linear layers round where parts meet and sum hundreds of products: three units. In float32
the unit is 1.2e-7 and does not count: what counts are sums of hundreds of terms in any order, and
approximations of exp and tanh, a few 1e-6; the limits are from 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ATTENTION", "KV", "LOGPROBS", "NEXT_CODE", "OP", "OP_CEILING", "op_tolerance"]

Table = Mapping[str, float]

_UNIT: Table = {"float32": 0.5e-5, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def _units(count: int) -> Table:
    return {dtype: count * unit for dtype, unit in _UNIT.items()}


_EXACT: Table = dict.fromkeys(_UNIT, 0.0)

OP: Mapping[str, Table] = {
    "embedding": _EXACT,
    "relu": _EXACT,
    "all_reduce": _EXACT,
    "add": _EXACT,
    "scale": _EXACT,
    "linear": _units(3),
    "int8_linear": _units(2),
    "int4_linear": _units(2),
    "rms_norm": _units(3),
    "add_rms_norm": _units(3),
    "layer_norm": _units(3),
    "rotary": _units(2),
    "silu_and_mul": _units(2),
    "gelu_tanh_and_mul": _units(2),
    "gelu": _units(2),
    "gelu_tanh": _units(2),
    "silu": _units(2),
    "soft_cap": _units(2),
}
"""By op and dtype."""

GATED_LINEAR: Table = _units(4)
"""By dtype: what stands for two ops may round once or twice."""

OP_CEILING = 4.0
"""A platform may state a tolerance of its own for an op that it overrides (``Op.tolerance``), up to
this many times the table's; what is less exact than that belongs into its known gaps."""

ATTENTION: Table = {"float32": 2e-5, "bfloat16": 3 * 2.0**-7, "float16": 3 * 2.0**-10}
"""By the dtype of queries and answers. Scores may be rounded to it before they are exponentiated
and weights before they are summed, as fused kernels do: three units."""

KV: Table = {
    "float32": 0.0,
    "bfloat16": 2.0**-7,
    "float16": 2.0**-10,
    "int8": 0.03,
    "fp8_e4m3": 0.12,
    "fp8_e5m2": 0.25,
}
"""By the dtype of the cache, on top of the above. The reference rounds keys and values to 16-bit
floats itself; codes are compared with the values before they were coded: with normally distributed
entries and a scale per head and token, attended values are off by up to this."""

LOGPROBS: Table = {"float32": 2e-3, "bfloat16": 0.35, "float16": 0.06}
"""Of a whole model, absolute, by the dtype of its weights. The kit's models have weights ten times
as wide as trained ones, which multiplies rounding on the way: a quarter of this was seen on the
reference platform."""

NEXT_CODE = 0.2
"""Of a model whose activations are rounded to 8 bits, absolute: where float32's last bit decides
between two codes, everything behind it is another draw of the rounding's noise. Seen were 0.09,
where activations were off by 1e-6; most tokens meet no such place, and keep to ``LOGPROBS``.
Without the rounding, half of the tokens are off by 0.03."""


def op_tolerance(name: str, dtype: str, stated: float | None) -> float:
    """The tolerance of an op: the table's, or what the platform states for its own, within reason.

    Args:
        name: Of the op.
        dtype: Of the activations.
        stated: ``Op.tolerance`` of the platform's override; None if it has none.
    """
    ours = OP[name][dtype]
    return ours if stated is None else min(stated, OP_CEILING * max(ours, _UNIT[dtype]))
