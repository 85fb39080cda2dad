"""A row that changes hands is as good as new (I20), whatever was left in it."""

from __future__ import annotations

import numpy as np
import pytest

from dovetail.core.request import SamplingParams
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.scheduler.sequence import Sequence
from tests.core.oracle import make_request

ROWS = 3
LASTING = {"epoch", "order"}
"""What belongs to the row or the table, not to who has the row."""


def arrays(table: RowTable) -> dict[str, np.ndarray]:
    """Every array with an entry per row."""
    return {
        name: value
        for name, value in vars(table).items()
        if isinstance(value, np.ndarray) and value.shape[:1] == (ROWS,) and name not in LASTING
    }


def poison(table: RowTable) -> None:
    for array in arrays(table).values():
        array[:] = True if array.dtype == bool else 77


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, max_tokens=4),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.5, min_p=0.1, max_tokens=4),
        SamplingParams(max_tokens=4, logprobs=3, prompt_logprobs=2, logit_bias={1: 2.0}),
    ],
)
@pytest.mark.parametrize("stops", [[], [1, 2], [1, 2, 3, 4, 5, 6, 7]])
def test_a_recycled_row_is_like_a_new_one(params: SamplingParams, stops: list[int]) -> None:
    tables = []
    for is_used in (False, True):
        table = RowTable(ROWS, 32, 4, 100)
        if is_used:
            table.join(Sequence(make_request(9, [1] * 30, 2, stop_token_ids=list(range(9)))), 8)
            table.leave(table.at(int(table.order[0])))
            poison(table)
        sequence = Sequence(make_request(1, [5, 6, 7], 4, params=params, stop_token_ids=stops))
        sequence.blocks = [3]
        joined = table.join(sequence, 2)
        tables.append((table, joined.row))
    (new, row), (used, other) = tables
    assert len(arrays(new)) > 15
    for name, array in arrays(new).items():
        fresh, recycled = array[row], arrays(used)[name][other]
        if name == "tokens":
            fresh, recycled = fresh[:3], recycled[:3]
        if name == "stop_ids":
            recycled, rest = recycled[: len(fresh)], recycled[len(fresh) :]
            assert (rest == -1).all()
        assert np.array_equal(fresh, recycled), f"{name} keeps something of the former owner"
