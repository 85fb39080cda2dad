"""Slips of one line, planted one at a time in the code that runs."""

from __future__ import annotations

import inspect
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

import pytest

from dovetail.core.kv import prefix
from dovetail.core.kv.pool import BlockPool
from dovetail.core.scheduler import masking, results
from dovetail.core.scheduler.beams import BeamSearches
from dovetail.core.scheduler.blocks import SequenceBlocks
from dovetail.core.scheduler.policy import WaitingQueue
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.scheduler.scheduler import Scheduler

__all__ = ["SLIPS", "Slip", "plant"]


@dataclass(frozen=True)
class Slip:
    """One line that could have been written otherwise."""

    name: str
    owner: Any
    """The class, or the module, that has the function."""
    function: str
    right: str
    wrong: str
    by_machine: bool = False
    """Found by the state machine of the pool; the others by the simulator."""


SLIPS = [
    Slip("double free", SequenceBlocks, "drop", "sequence.blocks = []", "pass"),
    Slip(
        "no decref when a request that has no token yet is aborted",
        Scheduler, "_end",
        "self.blocks.drop(sequence)", "sequence.has_started and self.blocks.drop(sequence)",
    ),
    Slip(
        "off by one in sharing a partial block",
        SequenceBlocks, "fork", "-(-num_shared // self.size)", "num_shared // self.size",
    ),
    Slip(
        "a whole prompt is taken from the cache, and nothing is left to compute",
        SequenceBlocks, "_find_cached", "(len(sequence.token_ids) - 1)", "len(sequence.token_ids)",
    ),
    Slip(
        "stale hash: a fork writes into a block that its parent has filled and named",
        SequenceBlocks, "_has_others", " or self.pool.name_of(block) is not None", "",
    ),
    Slip(
        "no copy-on-write by the parent",
        SequenceBlocks, "fork", "self.table.shares_tail[parent.row] = True", "pass",
    ),
    Slip("hash without salt", prefix, "root", 'salt.encode("utf-8", "surrogatepass")', 'b""'),
    Slip(
        "a shared block stays among those to evict",
        BlockPool, "share", "del self._cached[block]", "pass",
    ),
    Slip(
        "lost wake-up of forks whose parent ended",
        Scheduler, "_end", "self.waiting.push(child)", "pass",
    ),
    Slip(
        "wrong order after preemption",
        WaitingQueue, "push",
        "self._rank(sequence.request), ",
        "(len(self._heap), *self._rank(sequence.request)), ",
    ),
    Slip(
        "leak on preemption during prefill",
        Scheduler, "_preempt",
        "self.blocks.drop(sequence)", "sequence.has_started and self.blocks.drop(sequence)",
    ),
    Slip(
        "results of an old epoch are taken",
        Scheduler, "update", "live = epochs == self.table.epoch[batch.rows]", "live = epochs > 0",
    ),
    Slip(
        "a failed step is blamed on who has the row now",
        Scheduler, "step_failed",
        "self._under_way[batch.step] == self.table.epoch[batch.rows]",
        "self.table.request_id[batch.rows] > 0",
    ),
    Slip(
        "off by one at the boundary of a block",
        SequenceBlocks, "need", "(grants + (self.size - 1))", "grants",
    ),
    Slip(
        "a preempted request keeps tokens that nobody has seen",
        RowTable, "leave", "self.num_known[row]", "self.num_tokens[row]",
    ),
    Slip(
        "rejected drafts count as computed",
        results, "sequence_updates",
        "table.num_computed[drafted] = table.num_known[drafted] - 1", "pass",
    ),
    Slip(
        "a block that the window has not left is given back",
        SequenceBlocks, "release_behind",
        "first = np.maximum(done - self.window, 0) // self.size",
        "first = np.maximum(done - self.window, 0) // self.size + (done > self.window)",
    ),
    Slip(
        "tokens behind the end of a grammar are given out",
        masking, "advance_grammars",
        "update.token_ids = update.token_ids[: accepted.num_tokens]", "pass",
    ),
    Slip(
        "a row with a grammar runs ahead of its own tokens",
        RowTable, "join", "sequence.needs_known or self.has_grammar[row]", "sequence.needs_known",
    ),
    Slip(
        "a beam that is not chosen is not forgotten",
        BeamSearches, "_advance", "self._forget(beam.sequence)", "pass",
    ),
    Slip(
        "the row table misses a replaced block",
        RowTable, "replace_block", "self.blocks[row, index] = block", "pass",
    ),
    Slip(
        "no rollback of a partial allocation",
        BlockPool, "allocate", "if count > self.num_free:", "if False:", by_machine=True,
    ),
    Slip(
        "a double free is not noticed",
        BlockPool, "release", "if left < 0:", "if False:", by_machine=True,
    ),
    Slip(
        "an evicted block keeps its name",
        BlockPool, "forget_cached",
        "del self._block_of_hash[self._hash_of_block.pop(block)]",
        "del self._block_of_hash[self._hash_of_block[block]]",
        by_machine=True,
    ),
    Slip(
        "two blocks of one name",
        BlockPool, "register",
        "if digest in self._block_of_hash or block in self._hash_of_block:",
        "if block in self._hash_of_block:",
        by_machine=True,
    ),
]  # fmt: skip


def plant(slip: Slip, patch: pytest.MonkeyPatch) -> None:
    """Replace the function by itself with the slip in it, wherever its name was imported."""
    function = getattr(slip.owner, slip.function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(slip.right) == 1, f"{slip.right!r} is not there once:\n{source}"
    code = "from __future__ import annotations\n" + source.replace(slip.right, slip.wrong)
    made: dict[str, Any] = {}
    exec(code, function.__globals__, made)
    patch.setattr(slip.owner, slip.function, made[slip.function])
    if inspect.ismodule(slip.owner):
        for module in list(sys.modules.values()):
            if vars(module).get(slip.function) is function:
                patch.setattr(module, slip.function, made[slip.function])
