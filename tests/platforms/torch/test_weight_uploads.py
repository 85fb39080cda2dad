"""Weights arrive whole, whatever their dtype and size, and few pieces are on the way at a time."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from dovetail.platforms.torch.dtypes import from_numpy
from dovetail.platforms.torch.queue import HostQueue, Mark
from dovetail.platforms.torch.weight_uploads import WeightUploads

CPU = torch.device("cpu")


class Counting(HostQueue):
    """Knows how many pieces are out, and takes back the oldest when its mark is waited for."""

    def __init__(self) -> None:
        self.out = self.most = self.made = 0

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.made += 1
        return super().host_memory(shape, dtype)

    def mark(self) -> Mark:
        self.out += 1
        self.most = max(self.most, self.out)
        return self

    def wait(self) -> None:
        self.out -= 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (64, 33), (5, 1000)])
def test_arrays_arrive_as_they_are(dtype: Any, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(-100, 100, shape).astype(dtype)
    uploads = WeightUploads(HostQueue(), CPU, chunk_bytes=1000)
    for given in (array, array.T):
        assert torch.equal(uploads(given), from_numpy(given))


def test_a_few_pieces_are_enough() -> None:
    queue = Counting()
    uploads = WeightUploads(queue, CPU, chunk_bytes=100)
    arrays = [np.random.default_rng(i).integers(0, 9, 100 * i + 30) for i in range(1, 20)]
    for array in arrays:
        assert np.array_equal(uploads(array).numpy(), array)
    assert queue.most == 4
    assert queue.made < 4 + 2 * len(arrays)
