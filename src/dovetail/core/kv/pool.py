"""The pool of KV blocks: reference counts, the free list, and the index of cached prefixes."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from dovetail.core.errors import InvariantError
from dovetail.core.faults import fault

__all__ = ["BlockPool"]


class BlockPool:
    """Blocks 1 to ``num_blocks - 1``; block 0 is never given out, it pads block tables.

    A block is free (no references, content unknown), cached (no references, but its content is
    in the prefix index) or referenced. Cached blocks are given out when no free one is left, the
    longest unused first.

    Every method either does all of what it says or raises and changes nothing.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise InvariantError("pool", f"a pool needs at least 2 blocks, not {num_blocks}")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}

    @property
    def num_usable(self) -> int:
        """Blocks that can be given out at all."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be given out now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody refers to and whose content may be found again."""
        return len(self._cached)

    def references(self, block: int) -> int:
        """How many sequences refer to the block."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Take blocks with one reference each; their content is undefined.

        Raises:
            InvariantError: Fewer than ``count`` are free; ask ``num_free`` first.
        """
        fault("pool.allocate")
        if count > self.num_free:
            raise InvariantError("pool", f"I7: {count} blocks asked for, {self.num_free} free")
        from_cache = max(0, count - len(self._free))
        taken = self._free[len(self._free) - count + from_cache :]
        del self._free[len(self._free) - count + from_cache :]
        taken += [self._evict() for _ in range(from_cache)]
        for block in taken:
            self._references[block] = 1
        return taken

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        if self._references[block]:
            raise InvariantError("pool", f"I5: block {block} is evicted while it is referenced")
        del self._block_of_hash[self._hash_of_block.pop(block)]
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block. They must be referenced or cached."""
        for block in blocks:
            if self._references[block] == 0:
                if block not in self._cached:
                    raise InvariantError("pool", f"I4: block {block} is shared but nobody holds it")
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block, last first, so that a chain is evicted from its end.

        Raises:
            InvariantError: A block has no reference left to drop (a double release).
        """
        for block in reversed(blocks):
            left = self._references[block] - 1
            if left < 0:
                raise InvariantError("pool", f"I3: block {block} is released twice")
            self._references[block] = left
            if left == 0 and block in self._hash_of_block:
                self._cached[block] = None
            elif left == 0:
                self._free.append(block)

    def find(self, digest: bytes) -> int | None:
        """The block that holds the prefix with this hash, or None."""
        return self._block_of_hash.get(digest)

    def name_of(self, block: int) -> bytes | None:
        """The hash under which the block is in the prefix index, if it is."""
        return self._hash_of_block.get(block)

    def reference_counts(self) -> dict[int, int]:
        """How many blocks have how many references, block 0 left out. Linear in the pool."""
        return dict(sorted(Counter(self._references[1:]).items()))

    def is_cached(self, block: int) -> bool:
        """Whether it is in the index and nobody refers to it: sharing it uses up a free one."""
        return block in self._cached

    def register(self, block: int, digest: bytes) -> None:
        """Enter a full block, whose content will not change again, into the prefix index.

        A second block with the same content is left out: the first one stays.
        """
        if self._references[block] == 0:
            raise InvariantError("pool", f"I5: block {block} is registered but nobody refers to it")
        if digest in self._block_of_hash or block in self._hash_of_block:
            return
        self._block_of_hash[digest] = block
        self._hash_of_block[block] = digest

    def unregister(self, blocks: Iterable[int]) -> None:
        """Take blocks out of the prefix index: their content turned out to be bad."""
        for block in blocks:
            digest = self._hash_of_block.pop(block, None)
            if digest is not None:
                del self._block_of_hash[digest]

    def forget_cached(self) -> int:
        """Drop every prefix that nobody refers to; returns how many blocks became free."""
        count = len(self._cached)
        for block in self._cached:
            del self._block_of_hash[self._hash_of_block.pop(block)]
            self._free.append(block)
        self._cached.clear()
        return count

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Compare every count with the block lists of all holders; raises InvariantError.

        Linear in the pool: for tests and idle moments.
        """
        counted = [0] * self.num_blocks
        for blocks in held:
            for block in blocks:
                counted[block] += 1
        if counted != self._references:
            wrong = [b for b in range(self.num_blocks) if counted[b] != self._references[b]]
            raise InvariantError("pool", f"I2: reference counts of blocks {wrong[:8]} are wrong")
        idle = [*self._free, *self._cached]
        if len(set(idle)) != len(idle) or any(counted[b] for b in idle) or 0 in idle:
            raise InvariantError("pool", "I4: a block is free twice, or free and referenced")
        if len(idle) + sum(1 for c in counted[1:] if c) != self.num_usable:
            raise InvariantError("pool", "I1: a block is neither free, cached nor referenced")
        if {h: b for b, h in self._hash_of_block.items()} != self._block_of_hash:
            raise InvariantError("pool", "I6: the prefix index does not match the blocks")
