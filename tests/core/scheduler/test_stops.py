"""Stop tokens: columns against a dictionary of sets."""

import random

import numpy as np
import pytest

from dovetail.core.scheduler.stops import StopTokens

ROWS, VOCAB = 6, 12


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("width", [None, 3])
def test_found_is_membership(seed: int, width: int | None) -> None:
    rng = random.Random(seed)
    stops, model = StopTokens(ROWS), {row: set[int]() for row in range(ROWS)}
    for _ in range(30):
        row = rng.randrange(ROWS)
        model[row] = set(rng.sample(range(VOCAB), rng.choice([0, 0, 1, 2, 4, 5, 9])))
        stops.set(row, sorted(model[row]))
        rows = np.array(rng.sample(range(ROWS), rng.randrange(ROWS + 1)), np.intp)
        shape = (len(rows),) if width is None else (len(rows), width)
        tokens = np.array(
            [rng.randrange(VOCAB) for _ in range(int(np.prod(shape)))], np.int32
        ).reshape(shape)
        found = stops.found(rows, tokens)
        assert found.shape == shape
        pairs = zip(rows.tolist(), tokens, strict=True)
        want = [[token in model[row] for token in np.ravel(several)] for row, several in pairs]
        assert np.array_equal(found, np.array(want, np.bool_).reshape(shape))
