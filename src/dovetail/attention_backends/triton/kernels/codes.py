"""Entries of a cache of one byte each, as ``attention_backends/kv_codec.py`` defines them.

Made and read by their bits, so that every GPU gives the same bytes and the same numbers: not all
convert fp8 themselves, and some that do mean another format by it.
"""

from __future__ import annotations

from dovetail.attention_backends.triton.kernels.language import jit, tl

__all__ = ["decoded", "encoded", "scaled"]


@jit
def decoded(
    raw: tl.tensor, FORMAT: tl.constexpr, NATIVE: tl.constexpr, DOT: tl.constexpr
) -> tl.tensor:
    """Entries as operands of a product, exactly; coded ones without their scale.

    Args:
        raw: Floats, or uint8 codes.
        FORMAT: The KV dtype if entries are codes, else ``"plain"``.
        NATIVE: The GPU converts fp8_e4m3 of the Open Compute Project to float16.
        DOT: The dtype of the operands.
    """
    if FORMAT == "fp8_e4m3":
        if NATIVE:
            numbers = raw.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        else:
            # The bits s eeee mmm as the float16 s 0eeee mmm0000000 are the number over 2^8.
            bits = raw.to(tl.int8, bitcast=True).to(tl.int16) << 7
            numbers = (bits & -0x4001).to(tl.float16, bitcast=True) * 256.0
    elif FORMAT == "fp8_e5m2":
        numbers = (raw.to(tl.int16) << 8).to(tl.float16, bitcast=True)
    elif FORMAT == "int8":
        numbers = raw.to(tl.int8, bitcast=True).to(tl.float16)
    else:
        numbers = raw
    return numbers.to(DOT)


@jit
def scaled(x: tl.tensor, LARGEST: tl.constexpr) -> tl.tensor:
    """Vectors as codes are made of them, and their scales.

    Args:
        x: (N, E) float32.
        LARGEST: What the largest entry of a vector becomes.

    Returns:
        (N, E) float32 within -LARGEST and LARGEST, and (N,) bfloat16. A vector with an entry that
        is not finite gets a scale that is not a number.
    """
    odd = tl.sum(x * 0.0, axis=1)
    peak = tl.max(tl.abs(x), axis=1) + odd
    largest = tl.full(peak.shape, LARGEST, tl.float32)
    exact = tl.div_rn(peak, largest)
    # To the nearest bfloat16, also where casts cut off, as those of the interpreter do.
    bits = exact.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    nearest = tl.where(exact == exact, nearest.to(tl.float32, bitcast=True), exact)
    divisor = tl.where(nearest == 0.0, 1.0, nearest)
    quotient = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    return tl.minimum(tl.maximum(quotient, -LARGEST), LARGEST), nearest.to(tl.bfloat16)


@jit
def encoded(x: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """float32 within the range of the format to uint8, rounded to the nearest, ties to even."""
    if FORMAT == "int8":
        # Added to 1.5 * 2^23, a number leaves its integer in the lowest bits.
        number = (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        code = number.to(tl.int8).to(tl.uint8, bitcast=True)
    elif FORMAT == "fp8_e4m3":
        code = _fp8(x, 3, 7)
    else:
        code = _fp8(x, 2, 15)
    return code


@jit
def _fp8(x: tl.tensor, MANTISSA: tl.constexpr, BIAS: tl.constexpr) -> tl.tensor:
    """Sign, exponent with this bias, and so many bits of mantissa."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    rounded = bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)
    normal = (rounded >> DROPPED) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number steps are equal; 2^23 plus a number has steps of one.
    steps = magnitude * (1 << (BIAS - 1 + MANTISSA)) + 8388608.0
    subnormal = steps.to(tl.int32, bitcast=True) - 0x4B000000
    least: tl.constexpr = 1.0 / (1 << (BIAS - 1))
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(magnitude < least, subnormal, normal) | sign).to(tl.uint8)
