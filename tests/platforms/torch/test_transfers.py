"""Many arrays in one copy, behind memory that no copy touches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dovetail.core.errors import InvariantError
from dovetail.platforms.torch.queue import HostQueue
from dovetail.platforms.torch.transfers import Uploads

CPU = torch.device("cpu")
ARRAYS = (
    np.arange(5, dtype=np.int64) - (1 << 40),
    np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
    np.arange(7, dtype=np.int32),
)


def test_views_hold_what_was_sent() -> None:
    uploads = Uploads(HostQueue(), CPU, 64)
    uploads.send(ARRAYS)
    wide, table, last = uploads.views(ARRAYS)
    assert wide.dtype == torch.int64 and torch.equal(wide, torch.from_numpy(ARRAYS[0]))
    assert torch.equal(table, torch.from_numpy(ARRAYS[1]))
    assert last[:7].tolist() == list(range(7)) and len(last) > 7, "the last goes on to the end"
    assert all(view.data_ptr() % 16 == 0 for view in (wide, table, last))


def test_what_is_kept_stays_and_is_found_in_the_same_memory() -> None:
    uploads = Uploads(HostQueue(), CPU, 64, kept=3)
    uploads.kept[:] = torch.tensor([7, 8, 9], dtype=torch.int32)
    uploads.send(ARRAYS)
    first = Uploads.place(3, ARRAYS[:2])
    sources = torch.tensor([1, first, first + 4], dtype=torch.int32)
    assert uploads.memory.index_select(0, sources).tolist() == [8, 0, 4]
    assert uploads.kept.tolist() == [7, 8, 9]


def test_a_step_larger_than_any_was_said_to_be() -> None:
    size = Uploads.size(ARRAYS)
    Uploads(HostQueue(), CPU, size, kept=5).send(ARRAYS)
    with pytest.raises(InvariantError, match=f"a step of {size} numbers for {size - 1}"):
        Uploads(HostQueue(), CPU, size - 1, kept=5).send(ARRAYS)
