"""Attended values are those of the readable backend, whatever a layer is like."""

from __future__ import annotations

import pytest
import torch

from tests.attention_backends.triton.work import (
    SPECS,
    TOLERANCE,
    check_near,
    last_tokens,
    make_work,
    ran,
    wanted,
)
from tests.thorough import diagonal, every


@pytest.mark.parametrize(("name", "path"), diagonal(SPECS, ["whole", "last_tokens", "mixed"]))
def test_in_float32(name: str, path: str, device: torch.device) -> None:
    work = make_work(**SPECS[name])
    steps = last_tokens(work) if path == "last_tokens" else getattr(work, path)()
    check_near(ran(work, device, steps), wanted(work), TOLERANCE["float32"])


@pytest.mark.parametrize("name", every(3, SPECS))
def test_in_float16(name: str, device: torch.device) -> None:
    work = make_work(dtype="float16", **SPECS[name])
    check_near(ran(work, device, work.mixed()), wanted(work), TOLERANCE["float16"])


def test_in_bfloat16(device: torch.device) -> None:
    work = make_work(dtype="bfloat16")
    check_near(ran(work, device, last_tokens(work)), wanted(work), TOLERANCE["bfloat16"])


def test_one_by_one(device: torch.device) -> None:
    work = make_work((3, 18))
    check_near(ran(work, device, work.one_by_one()), wanted(work), TOLERANCE["float32"])


@pytest.mark.parametrize("size", every(2, [80, 160, 256]))
def test_head_sizes(size: int, device: torch.device) -> None:
    work = make_work((5, 19), size=size, heads=2, kv_heads=1)
    check_near(ran(work, device, last_tokens(work)), wanted(work), TOLERANCE["float32"])


@pytest.mark.parametrize("block_size", every(2, [1, 8, 48, 64]))
def test_tiles_and_blocks_have_sizes_of_their_own(block_size: int, device: torch.device) -> None:
    work = make_work((5, 50), block_size=block_size)
    check_near(ran(work, device, last_tokens(work)), wanted(work), TOLERANCE["float32"])


@pytest.mark.parametrize("window", every(2, [1, 3, 16]))
def test_windows_may_be_narrower_than_a_tile(window: int, device: torch.device) -> None:
    work = make_work((5, 50), window=window)
    check_near(ran(work, device, work.mixed()), wanted(work), TOLERANCE["float32"])


@pytest.mark.parametrize("count", every(2, [2, 8, 9]))
def test_rows_with_drafts(count: int, device: torch.device) -> None:
    """A few queries of each row, behind a cached beginning."""
    work = make_work((20, 33, 50))
    steps = [
        [(i, 0, n - count) for i, n in enumerate(work.lengths)],
        [(i, n - count, count) for i, n in enumerate(work.lengths)],
    ]
    check_near(ran(work, device, steps), wanted(work), TOLERANCE["float32"])


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    work = make_work(soft_cap=30.0)
    work.q = [100 * q for q in work.q]
    check_near(ran(work, device, work.mixed()), wanted(work), 3e-5)
