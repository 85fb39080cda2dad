from collections.abc import Iterator

import pytest

from dovetail.core.conformance.shelf import Shelf


@pytest.fixture(scope="session")
def shelf() -> Iterator[Shelf]:
    """Models that all tests of the kit share."""
    made = Shelf()
    yield made
    made.close()
