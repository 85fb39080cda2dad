from collections.abc import Iterator

import pytest
import torch

from dovetail.core.conformance.shelf import Shelf


@pytest.fixture(scope="session")
def shelf() -> Iterator[Shelf]:
    """Models that all tests of the kit share."""
    made = Shelf()
    yield made
    made.close()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The kit's models are so small that a second thread only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
