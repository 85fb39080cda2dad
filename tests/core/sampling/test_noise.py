import timeit

import numpy as np

from dovetail.core.sampling.noise import uniform


def seeds(*values):
    return np.array(values, np.uint64)


def test_values_never_change():
    who = seeds(0, 1, 42, 1 << 63, (1 << 64) - 1, 123456789)
    where = np.array([0, 0, 7, 1000, (1 << 31) - 1, 131071])
    first = [14819496, 12578688, 2565124, 4410844, 7773232, 12409941]
    second = [6094019, 2916774, 13153752, 15156658, 4791968, 16444041]
    assert (uniform(who, where) * 2**24).tolist() == first
    assert (uniform(who, where, stream=1) * 2**24).tolist() == second


def test_seed_zero_is_the_published_splitmix64_sequence():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    found = uniform(seeds(0, 0, 0), np.arange(3))
    assert (found * 2**24).tolist() == [value >> 40 for value in published]


def test_shape_dtype_range_and_arguments_are_left_alone():
    who, where = seeds(*range(1000)), np.arange(1000, dtype=np.int32)
    found = uniform(who, where)
    assert found.dtype == np.float32 and found.shape == (1000,)
    assert found.min() >= 0 and found.max() < 1
    assert who.tolist() == list(range(1000)) and where.tolist() == list(range(1000))
    assert uniform(who[:0], where[:0]).shape == (0,)


def test_a_number_depends_on_its_own_seed_and_position_only():
    who, where = seeds(*range(64)), np.arange(64)
    whole = uniform(who, where)
    alone = [uniform(who[i : i + 1], where[i : i + 1])[0] for i in range(64)]
    assert whole.tolist() == alone
    assert uniform(who[::-1], where[::-1].astype(np.int64)).tolist() == alone[::-1]


def grid(size=400, stream=0):
    """Numbers of neighbouring seeds (rows) and positions (columns): where bad mixing shows."""
    who, where = np.meshgrid(np.arange(size, dtype=np.uint64), np.arange(size), indexing="ij")
    return uniform(who.ravel(), where.ravel(), stream).reshape(size, size).astype(np.float64)


def chi_square(values, bins=64):
    counts = np.histogram(values, bins, (0, 1))[0]
    expected = values.size / bins
    return float(((counts - expected) ** 2 / expected).sum())


def test_uniform_over_seeds_over_positions_and_in_all():
    numbers = grid()
    limit = 63 + 5 * np.sqrt(2 * 63)
    assert chi_square(numbers) < limit
    by_seed = [chi_square(row, 16) for row in numbers]
    by_position = [chi_square(column, 16) for column in numbers.T]
    for found in (by_seed, by_position):
        assert max(found) < 60
        assert abs(np.mean(found) - 15) < 5 * np.sqrt(30 / 400)


def correlation(a, b):
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) * np.sqrt(a.size)


def test_neighbours_are_independent():
    numbers = grid()
    for lag in (1, 2, 3, 7, 64):
        assert abs(correlation(numbers[lag:], numbers[:-lag])) < 5
        assert abs(correlation(numbers[:, lag:], numbers[:, :-lag])) < 5
        assert abs(correlation(numbers[lag:, lag:], numbers[:-lag, :-lag])) < 5
    assert abs(correlation(numbers, numbers.T)) < 5 * np.sqrt(2)
    assert abs(correlation(numbers, grid(stream=1))) < 5
    pairs = np.histogram2d(numbers[:, :-1].ravel(), numbers[:, 1:].ravel(), 16, ((0, 1), (0, 1)))[0]
    expected = pairs.sum() / 256
    assert ((pairs - expected) ** 2 / expected).sum() < 255 + 5 * np.sqrt(2 * 255)


def test_every_bit_of_seed_and_position_flips_half_of_the_result():
    who, where = seeds(*range(500)), np.arange(500, dtype=np.int64)
    base = (uniform(who, where) * 2**24).astype(np.uint32)
    changed = [uniform(who ^ np.uint64(1 << bit), where) for bit in range(64)]
    changed += [uniform(who, where ^ (1 << bit)) for bit in range(31)]
    for numbers in changed:
        different = base ^ (numbers * 2**24).astype(np.uint32)
        flips = np.unpackbits(different.view(np.uint8)).sum() / (24 * len(base))
        assert abs(flips - 0.5) < 0.03


def test_cost():
    who, where = seeds(*range(256)), np.arange(256, dtype=np.int32)
    best = min(timeit.repeat(lambda: uniform(who, where), number=200, repeat=5)) / 200
    assert best < 100e-6, "15 us are usual; this only catches a loop over rows"
