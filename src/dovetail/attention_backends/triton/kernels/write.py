"""Everything that happens to queries, keys and values before they are attended."""

from __future__ import annotations

from dovetail.attention_backends.triton.kernels.codes import encoded, scaled
from dovetail.attention_backends.triton.kernels.language import jit, kernel, tl
from dovetail.attention_backends.triton.kernels.tiles import store_rows

__all__ = ["write"]


@kernel
def write(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, turned_ptr: tl.tensor,
    cos_ptr: tl.tensor, sin_ptr: tl.tensor, q_norm_ptr: tl.tensor, k_norm_ptr: tl.tensor,
    keys_ptr: tl.tensor, values_ptr: tl.tensor, key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor, slots_ptr: tl.tensor,
    q_token: tl.tensor, q_head: tl.tensor, k_token: tl.tensor, k_head: tl.tensor,
    v_token: tl.tensor, v_head: tl.tensor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_SIZE: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr,
    EPS: tl.constexpr, PART: tl.constexpr,
) -> None:  # fmt: skip
    """Norm and rotate query and key heads, put keys and values into the cache.

    One program is PART heads of one token; the first ones are query heads. Without a rotation
    (HALF 0) there are none of those: queries stay where they are. Norms are root-mean-square norms
    (Zhang and Sennrich, 2019), rotations those of Su et al. (2021).

    Args:
        turned_ptr: (T, H, KEY_SIZE) takes the queries.
        cos_ptr: (T, HALF), and the sines alike.
        q_norm_ptr: (KEY_SIZE,) where NORMED, and that of keys alike.
        slots_ptr: (T,) block number times BLOCK plus offset.
    """
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    Q_PARTS: tl.constexpr = (HEADS + PART - 1) // PART if HALF else 0
    # Two conditions: without a rotation, what is read inside is not there to be compiled.
    if Q_PARTS > 0:  # noqa: SIM102
        if part < Q_PARTS:
            heads = part * PART + tl.arange(0, PART)
            x = _positioned(
                q_ptr + token * q_token, heads, q_head, HEADS, token, cos_ptr, sin_ptr, q_norm_ptr,
                KEY_SIZE, KEY_WIDTH, HALF, NORMED, EPS,
            )  # fmt: skip
            store_rows(
                turned_ptr + token * HEADS * KEY_SIZE, heads, x, heads < HEADS, KEY_SIZE, KEY_WIDTH
            )
            return
    heads = (part - Q_PARTS) * PART + tl.arange(0, PART)
    mine = heads < KV_HEADS
    slot = tl.load(slots_ptr + token).to(tl.int64)
    places = ((slot // BLOCK) * KV_HEADS + heads) * BLOCK + slot % BLOCK
    k = _positioned(
        k_ptr + token * k_token, heads, k_head, KV_HEADS, token, cos_ptr, sin_ptr, k_norm_ptr,
        KEY_SIZE, KEY_WIDTH, HALF, NORMED, EPS,
    )  # fmt: skip
    v = _loaded(v_ptr + token * v_token, heads, v_head, mine, VALUE_SIZE, VALUE_WIDTH)
    if FORMAT == "plain":
        store_rows(keys_ptr, places, k, mine, KEY_SIZE, KEY_WIDTH)
        store_rows(values_ptr, places, v, mine, VALUE_SIZE, VALUE_WIDTH)
    else:
        wide, scales = scaled(k.to(tl.float32), LARGEST)
        store_rows(keys_ptr, places, encoded(wide, FORMAT), mine, KEY_SIZE, KEY_WIDTH)
        tl.store(key_scales_ptr + places, scales, mask=mine)
        wide, scales = scaled(v.to(tl.float32), LARGEST)
        store_rows(values_ptr, places, encoded(wide, FORMAT), mine, VALUE_SIZE, VALUE_WIDTH)
        tl.store(value_scales_ptr + places, scales, mask=mine)


@jit
def _loaded(
    x_ptr: tl.tensor,
    heads: tl.tensor,
    stride: tl.tensor,
    mine: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """(PART, WIDTH); 0 beyond SIZE and for heads that are not ``mine``."""
    at = tl.arange(0, WIDTH)
    mask = mine[:, None] & (at < SIZE)[None, :]
    return tl.load(x_ptr + heads[:, None] * stride + at[None, :], mask=mask, other=0.0)


@jit
def _positioned(
    x_ptr: tl.tensor,
    heads: tl.tensor,
    stride: tl.tensor,
    HEADS: tl.constexpr,
    token: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    NORMED: tl.constexpr,
    EPS: tl.constexpr,
) -> tl.tensor:
    """Heads of one token as they are attended, (PART, WIDTH), in the dtype that they come in."""
    mine = heads < HEADS
    x = _loaded(x_ptr, heads, stride, mine, SIZE, WIDTH)
    if HALF > 0:
        at = tl.arange(0, WIDTH)
        turns, first = at < 2 * HALF, at < HALF
        partner = tl.where(first, at + HALF, at - HALF)
        mask = mine[:, None] & turns[None, :]
        y = tl.load(x_ptr + heads[:, None] * stride + partner[None, :], mask=mask, other=0.0)
        a, b = x.to(tl.float32), y.to(tl.float32)
        if NORMED:
            factor = tl.rsqrt(tl.sum(a * a, axis=1) / SIZE + EPS)[:, None]
            weight = tl.load(norm_ptr + at, mask=at < SIZE, other=0.0)[None, :]
            a = _weighted(a * factor, weight, x.dtype)
            weight = tl.load(norm_ptr + partner, mask=turns, other=0.0)[None, :]
            b = _weighted(b * factor, weight, x.dtype)
        angle = tl.where(first, at, at - HALF)
        cos = tl.load(cos_ptr + token * HALF + angle, mask=turns, other=1.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + token * HALF + angle, mask=turns, other=0.0).to(tl.float32)[None, :]
        x = (a * cos + tl.where(first[None, :], -b, b) * sin).to(x.dtype)
    return x


@jit
def _weighted(normed: tl.tensor, weight: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Times the weight, rounded where the op ``rms_norm`` rounds; float32."""
    rounded = normed.to(weight.dtype).to(tl.float32)
    return (rounded * weight.to(tl.float32)).to(weight.dtype).to(DTYPE).to(tl.float32)
