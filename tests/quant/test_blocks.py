"""Blocks of rows are all rows, once each, and what goes wrong in one is said."""

import ml_dtypes
import numpy as np
import pytest

from dovetail.quant import blocks
from dovetail.quant.blocks import Floats, for_row_blocks


@pytest.mark.parametrize("shape", [(1, 1), (7, 30), (100, 33), (3, 5000), (0, 4)])
def test_every_row_comes_once(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ENTRIES", 256)
    weight = np.random.default_rng(0).standard_normal(shape).astype(ml_dtypes.bfloat16)
    seen = np.zeros(shape, np.float32)

    def add(rows: slice, values: Floats) -> None:
        assert values.flags.c_contiguous and values.flags.writeable
        seen[rows] += values

    for_row_blocks(weight, add)
    assert np.array_equal(seen, weight.astype(np.float32))


def test_an_error_in_a_thread_is_raised() -> None:
    def fail(rows: slice, values: Floats) -> None:
        raise ValueError(f"rows {rows.start}")

    with pytest.raises(ValueError, match="rows 0"):
        for_row_blocks(np.ones((4, 4), np.float32), fail)
