"""The block pool: counts, eviction order, and refusals that change nothing."""

import numpy as np
import pytest

from dovetail.core.errors import InvariantError
from dovetail.core.kv.pool import BlockPool
from dovetail.core.kv.prefix import extend_chain, root


def test_blocks_come_and_go() -> None:
    pool = BlockPool(9)
    blocks = pool.allocate(8)
    assert sorted(blocks) == list(range(1, 9))
    assert pool.num_free == 0
    pool.release(blocks)
    assert pool.num_free == 8
    pool.check([])


def test_too_many_blocks_asked_for_change_nothing() -> None:
    pool = BlockPool(5)
    held = pool.allocate(3)
    with pytest.raises(InvariantError, match="2 blocks asked for, 1 free"):
        pool.allocate(2)
    pool.check([held])


def test_a_double_release_is_found() -> None:
    pool = BlockPool(5)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(InvariantError, match="released twice"):
        pool.release([block])


def test_sharing_a_block_that_nobody_holds_is_found() -> None:
    pool = BlockPool(5)
    with pytest.raises(InvariantError, match="nobody holds it"):
        pool.share([2])


def test_a_cached_block_is_found_until_it_is_evicted() -> None:
    pool = BlockPool(4)
    a, b, c = pool.allocate(3)
    for block in (a, b, c):
        pool.register(block, bytes([block]))
    pool.release([a, b, c])
    assert pool.num_free == 3
    assert pool.find(bytes([a])) == a
    pool.share([a])
    assert pool.allocate(1) == [c], "of a released chain the end is evicted first"
    assert pool.find(bytes([c])) is None
    assert pool.find(bytes([b])) == b
    pool.check([[a], [c]])


def test_unregistered_blocks_are_forgotten_at_once() -> None:
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.register(block, b"x")
    pool.unregister([block])
    assert pool.find(b"x") is None
    pool.release([block])
    pool.check([])


def test_a_wrong_count_is_found_by_the_check() -> None:
    pool = BlockPool(4)
    held = pool.allocate(2)
    with pytest.raises(InvariantError, match="reference counts"):
        pool.check([held[:1]])


def test_chains_name_prefixes() -> None:
    tokens = np.arange(12, dtype=np.int32)
    chain: list[bytes] = []
    extend_chain(chain, root(""), tokens[:10], 4)
    assert len(chain) == 2
    longer: list[bytes] = []
    extend_chain(longer, root(""), tokens, 4)
    assert longer[:2] == chain
    other: list[bytes] = []
    extend_chain(other, root("tenant"), tokens, 4)
    assert not set(other) & set(longer)
