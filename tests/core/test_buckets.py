"""Padded steps: every real token, row and block is where it was, and few shapes are left."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.batch import Batch
from dovetail.core.buckets import Buckets, StepShape, doubling, pad_to, padded
from tests.attention_backends.sequences import NO_SAMPLING

BUCKETS = Buckets(decode=(1, 2, 4, 8), tokens=(16, 64), blocks=(2, 4))
SIZE = 16


def make_batch(query_lens: list[int], context_lens: list[int]) -> Batch:
    ends = np.array(query_lens) + np.array(context_lens)
    width = int(-(-ends.max() // SIZE))
    rows = np.arange(len(query_lens))
    none = np.zeros(0, np.intp)
    return Batch(
        step=1,
        rows=rows,
        query_lens=np.array(query_lens, np.int32),
        context_lens=np.array(context_lens, np.int32),
        block_tables=(1 + rows[:, None] * width + np.arange(width)).astype(np.int32),
        token_ids=np.arange(100, 100 + sum(query_lens), dtype=np.int32),
        carried=none,
        carried_rows=none,
        sampled=rows,
        sampling=NO_SAMPLING,
        copies=np.zeros((0, 2), np.int32),
    )


ROW = st.tuples(st.integers(1, 12), st.integers(0, 50))


@given(st.lists(ROW, min_size=1, max_size=5))
def test_padding_moves_nothing(rows: list[tuple[int, int]]) -> None:
    batch = make_batch([q for q, _ in rows], [c for _, c in rows])
    step = BUCKETS.pad(batch)
    shape = StepShape(step.num_tokens, step.num_rows, step.block_tables.shape[1])
    assert shape in set(BUCKETS.shapes())
    assert shape == BUCKETS.shape_of(step), "padding again changes nothing"
    assert shape.is_decode == all(q == 1 for q, _ in rows)
    count, real = batch.num_tokens, batch.num_rows
    assert step.num_padding == step.num_tokens - count
    for name in ("token_ids", "positions", "row_of_token"):
        assert np.array_equal(getattr(step, name)[:count], getattr(batch, name))
    assert np.array_equal(step.slots(SIZE)[:count], batch.slots(SIZE))
    assert np.array_equal(step.logit_index, batch.logit_index)
    assert np.array_equal(step.query_starts[: real + 1], batch.query_starts)
    assert np.array_equal(
        step.block_tables[:real, : batch.block_tables.shape[1]], batch.block_tables
    )
    assert not step.positions[count:].any()
    assert not step.slots(SIZE)[count:].any(), "what pads is written to block 0"
    assert not step.block_tables[real:].any()


def test_every_shape_is_named_once() -> None:
    shapes = list(BUCKETS.shapes())
    assert len(shapes) == len(set(shapes)) == 2 * (4 + 2)
    assert {shape.num_rows for shape in shapes if not shape.is_decode} == {8}


def test_a_step_of_few_tokens_is_not_taken_for_one_that_decodes() -> None:
    shape = Buckets(decode=(1, 8), tokens=(4, 16), blocks=(4,)).shape_of(make_batch([3], [0]))
    assert shape == StepShape(4, 3, 4)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"size 80 does not fit in \(16, 64\)"):
        BUCKETS.pad(make_batch([60, 20], [0, 0]))
    with pytest.raises(ValueError, match=r"size 5 does not fit in \(2, 4\)"):
        BUCKETS.pad(make_batch([1], [70]))


def test_a_shape_may_be_named() -> None:
    step = pad_to(make_batch([2], [0]), StepShape(16, 8, 4))
    assert (step.num_tokens, step.num_rows, step.block_tables.shape) == (16, 8, (8, 4))
    assert step.num_padding == 14


@pytest.mark.parametrize(
    ("smallest", "largest", "sizes"),
    [(1, 8, (1, 2, 4, 8)), (1, 6, (1, 2, 4, 6)), (8, 3, (3,)), (4, 4, (4,))],
)
def test_doubling(smallest: int, largest: int, sizes: tuple[int, ...]) -> None:
    assert doubling(smallest, largest) == sizes


def test_padded_keeps_the_dtype_and_the_beginning() -> None:
    array = np.ones((2, 3), np.int32)
    got = padded(array, 4, axis=1)
    assert got.dtype == np.int32 and got.tolist() == [[1, 1, 1, 0]] * 2
    assert padded(array, 2) is array
