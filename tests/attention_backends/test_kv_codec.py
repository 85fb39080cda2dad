from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from dovetail.attention_backends.kv_codec import CODECS

NUMPY = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2, "int8": np.int8}
STEP = {"fp8_e4m3": 2.0**-4, "fp8_e5m2": 2.0**-3}
"""Half the distance of neighbours, relative to the smaller."""


@pytest.mark.parametrize("name", CODECS)
def test_bytes_mean_what_the_format_says(name: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    want = codes.view(NUMPY[name]).astype(np.float32)
    got = CODECS[name].to_numbers(torch.from_numpy(codes)).numpy()
    finite = np.isfinite(want)
    assert finite.sum() >= 248
    assert np.array_equal(got[finite], want[finite])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("name", CODECS)
def test_an_entry_is_off_by_half_a_step_at_most(
    name: str, magnitude: float, dtype: torch.dtype
) -> None:
    codec = CODECS[name]
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * magnitude
    x = x.to(dtype)
    codes, scales = codec.encode(x)
    assert (codes.dtype, codes.shape, scales.dtype) == (torch.uint8, x.shape, torch.bfloat16)
    error = (codec.decode(codes, scales) - x.float()).abs()
    scale = scales.float()[:, None]
    # The scale is rounded to 8 bits, so that the largest entry may have to be cut by 2^-8.
    cut = x.float().abs() * 2.0**-8
    if name == "int8":
        bound = scale * 0.5001 + cut
    else:
        bound = x.float().abs() * STEP[name] + scale * 2.0**-9 + cut
    assert (error <= bound).all()


@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_and_rows_do_not_matter_to_each_other(name: str) -> None:
    codec = CODECS[name]
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
    x[2, 1] = 0
    codes, scales = codec.encode(x)
    assert (codec.decode(codes, scales)[2, 1] == 0).all()
    for i in range(5):
        alone, scale = codec.encode(x[i])
        assert torch.equal(alone, codes[i]) and torch.equal(scale, scales[i])


@pytest.mark.parametrize("name", CODECS)
def test_what_is_not_finite_is_not_hidden(name: str) -> None:
    codec = CODECS[name]
    x = torch.ones(3, 8)
    x[0, 3], x[1, 3] = float("nan"), float("inf")
    back = codec.decode(*codec.encode(x))
    assert back[:2].isnan().any(-1).all()
    assert back[2].isfinite().all()
