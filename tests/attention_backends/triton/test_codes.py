"""Caches of one byte per entry: the bytes of the codec, and values as it gives them."""

from __future__ import annotations

import pytest
import torch

from dovetail.attention_backends.kv_codec import CODECS
from dovetail.attention_backends.triton.backend import TritonAttention
from tests.attention_backends.triton.work import (
    TOLERANCE,
    check_near,
    last_tokens,
    make_work,
    moved,
    ran,
    wanted,
)
from tests.thorough import diagonal, every


@pytest.mark.parametrize(
    ("kv_dtype", "dtype"), diagonal(CODECS, ["float32", "float16", "bfloat16"])
)
def test_bytes_and_scales_are_the_codecs(kv_dtype: str, dtype: str, device: torch.device) -> None:
    work = make_work((16,), dtype=dtype, kv_dtype=kv_dtype, size=64)
    # From zero over what is subnormal in the formats to large numbers.
    work.k[0] *= torch.logspace(-7, 4, 64).to(work.k[0].dtype)
    work.v[0][3] = 0
    there, backend = moved(work, device), TritonAttention(device)
    cache = backend.allocate(work.spec, work.need, work.num_blocks)
    plan = backend.plan(work.batch([(0, 0, 16)]), work.need)
    backend.attend(there.q[0], there.k[0], there.v[0], cache, plan, work.spec)
    block = int(work.tables[0, 0])
    for side, codes, scales in (
        (work.k[0], cache.keys, cache.key_scales),
        (work.v[0], cache.values, cache.value_scales),
    ):
        assert scales is not None
        want_codes, want_scales = CODECS[kv_dtype].encode(side)
        assert torch.equal(scales[block].T.cpu(), want_scales)
        assert torch.equal(codes[block].transpose(0, 1).cpu(), want_codes)


@pytest.mark.parametrize(
    ("kv_dtype", "dtype"),
    [
        *every(3, ((kv_dtype, "float16") for kv_dtype in CODECS)),
        ("fp8_e4m3", "float32"),
        ("int8", "bfloat16"),
    ],
)
def test_values(kv_dtype: str, dtype: str, device: torch.device) -> None:
    work = make_work(dtype=dtype, kv_dtype=kv_dtype)
    steps = work.mixed() if dtype == "float16" else last_tokens(work)
    check_near(ran(work, device, steps), wanted(work), TOLERANCE[dtype])


@pytest.mark.parametrize("settings", [{"soft_cap": 2.0}, {"alibi_slopes": (0.5, 0.1, 0.2, 0.3)}])
def test_with_other_scores(settings: dict[str, object], device: torch.device) -> None:
    work = make_work(dtype="float16", kv_dtype="fp8_e4m3", **settings)
    check_near(ran(work, device, work.whole()), wanted(work), TOLERANCE["float16"])


def test_no_number_is_too_large_for_float16(device: torch.device) -> None:
    """Queries and values of bfloat16 are multiplied as float16 after being scaled."""
    work = make_work(dtype="bfloat16", kv_dtype="fp8_e4m3")
    work.q = [1e-12 * q for q in work.q]
    work.k = [1e12 * k for k in work.k]
    work.v = [1e9 * v for v in work.v]
    got, want = (
        [1e-9 * out for out in each] for each in (ran(work, device, work.whole()), wanted(work))
    )
    check_near(got, want, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16"])
def test_a_cache_of_other_floats(kv_dtype: str, device: torch.device) -> None:
    work = make_work(kv_dtype=kv_dtype)
    # The reference stores to the nearest; the interpreter cuts bfloat16 off.
    check_near(ran(work, device, last_tokens(work)), wanted(work), 2.0**-6)


@pytest.mark.parametrize("kv_dtype", [*CODECS, "float32"])
def test_blocks_are_copied_with_their_scales(kv_dtype: str, device: torch.device) -> None:
    work = make_work((32,), kv_dtype=kv_dtype)
    there, backend = moved(work, device), TritonAttention(device)
    cache = backend.allocate(work.spec, work.need, work.num_blocks + 2)
    plan = backend.plan(work.batch([(0, 0, 32)]), work.need)
    backend.attend(there.q[0], there.k[0], there.v[0], cache, plan, work.spec)
    fresh = work.num_blocks
    pairs = torch.tensor([[work.tables[0, 0], fresh], [work.tables[0, 1], fresh + 1]])
    backend.copy_blocks([cache], pairs.int().numpy())
    for part in cache.parts():
        assert torch.equal(part[fresh:], part[work.tables[0].tolist()])
        assert part[fresh:].float().abs().sum() > 0
