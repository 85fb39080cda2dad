"""The invariants of scheduler and pool that take time in proportion to their size.

Cheap ones are raised where they would be broken. These are looked at after each step in tests and
in the simulator, and now and then by an engine that has nothing to do. The numbers are those of
``docs/invariants.md``.
"""

from __future__ import annotations

from collections import Counter
from hashlib import sha256

import numpy as np

from dovetail.core.errors import InvariantError
from dovetail.core.scheduler.scheduler import Scheduler
from dovetail.core.scheduler.sequence import Sequence

__all__ = ["check_scheduler"]


def check_scheduler(scheduler: Scheduler) -> None:
    """Look at everything; changes nothing.

    Raises:
        InvariantError: The first thing that is wrong, with the number of its invariant.
    """
    scheduler.pool.check(scheduler.held_blocks())
    _places(scheduler)
    _rows(scheduler)
    _tables(scheduler)
    _names(scheduler)
    _counts(scheduler)
    if not scheduler.sequences:
        _idle(scheduler)


def _fail(number: int, message: str, scope: str = "engine") -> None:
    raise InvariantError(scope, f"I{number}: {message}")


def _places(scheduler: Scheduler) -> None:
    """Every sequence is in one place: a row, the queue, or its parent's list of children."""
    children = [child for s in scheduler.sequences.values() for child in s.children]
    running = [s for s in scheduler.table.sequences if s is not None]
    places = Counter(s.request.id for s in (*scheduler.waiting, *children, *running))
    for request_id, count in places.items():
        if count != 1 or request_id not in scheduler.sequences:
            _fail(12, f"request {request_id} is in {count} places, or unknown")
    for request_id, sequence in scheduler.sequences.items():
        if request_id not in places and not sequence.rests:
            _fail(12, f"request {request_id} is in no queue and has no row")
    for sequence in scheduler.sequences.values():
        if sequence.children and sequence.has_started:
            _fail(12, f"children of request {sequence.request.id} wait though it has started")


def _rows(scheduler: Scheduler) -> None:
    """Rows, their owners and the counters of each agree."""
    table = scheduler.table
    order = table.order.tolist()
    taken = [row for row, s in enumerate(table.sequences) if s is not None]
    if sorted(order) != taken or len(order) + table.num_vacant != len(table.sequences):
        _fail(20, f"rows {order} are in order, {taken} are taken, {table.num_vacant} are vacant")
    for row in order:
        sequence = table.at(row)
        if sequence.row != row or table.request_id[row] != sequence.request.id:
            _fail(20, f"row {row} and request {sequence.request.id} do not name each other")
        known, tokens = int(table.num_known[row]), int(table.num_tokens[row])
        computed, total = int(table.num_computed[row]), int(table.total[row])
        if not (sequence.num_prompt_tokens <= known <= tokens and known < total):
            _fail(11, f"row {row} has {known} known of {tokens} tokens, of at most {total}")
        guesses = scheduler.config.speculation
        drafts = guesses.num_speculative_tokens if guesses and scheduler.num_under_way else 0
        if not 0 <= computed <= max(tokens, known) + drafts:
            _fail(11, f"row {row} has computed {computed} of {tokens} tokens")


def _tables(scheduler: Scheduler) -> None:
    """Block tables of rows are the lists of their sequences, and hold what was computed."""
    table, size = scheduler.table, scheduler.table.block_size
    for row in table.order.tolist():
        sequence, count = table.at(row), int(table.num_blocks[row])
        if table.blocks[row, :count].tolist() != sequence.blocks:
            _fail(2, f"the block table of row {row} is not that of its sequence", "pool")
        if count * size < table.num_computed[row]:
            _fail(11, f"row {row} has {count} blocks for {table.num_computed[row]} tokens")
    for sequence in scheduler.waiting:
        if sequence.blocks and not sequence.num_shared_tokens:
            _fail(8, f"request {sequence.request.id} waits and holds blocks", "pool")


def _names(scheduler: Scheduler) -> None:
    """What the prefix index says of a block is what its holders have in it.

    A fork that waits may hold a block which its parent went on to fill: it copies it first.
    """
    for sequence in scheduler.sequences.values():
        entered = [scheduler.pool.name_of(block) for block in sequence.blocks]
        last = max((i for i, name in enumerate(entered) if name is not None), default=-1)
        names = _chain(scheduler, sequence, last + 1)
        if last >= len(names) and sequence.row is not None:
            _fail(5, f"a partial block of request {sequence.request.id} is in the index", "pool")
        for index, name in enumerate(names):
            if entered[index] is not None and entered[index] != name:
                what = f"block {sequence.blocks[index]}, of request {sequence.request.id},"
                _fail(6, f"{what} is in the prefix index under another prefix or salt", "pool")


def _chain(scheduler: Scheduler, sequence: Sequence, num_blocks: int) -> list[bytes]:
    """The names of the first full blocks of known tokens, worked out without ``kv.prefix``."""
    table, size = scheduler.table, scheduler.table.block_size
    tokens = sequence.token_ids
    if sequence.row is not None:
        tokens = table.tokens[sequence.row, : table.num_known[sequence.row]]
    salt = sequence.request.cache_salt.encode("utf-8", "surrogatepass")
    name = sha256(len(salt).to_bytes(8, "little") + salt).digest()
    names = []
    for start in range(0, min(len(tokens), num_blocks * size) - size + 1, size):
        block = np.ascontiguousarray(tokens[start : start + size], "<i4")
        name = sha256(name + block.tobytes()).digest()
        names.append(name)
    return names


def _counts(scheduler: Scheduler) -> None:
    """Every request that was accepted has ended once, or is here."""
    stats = scheduler.stats
    ended = stats.num_finished + stats.num_aborted + stats.num_failed
    beams = sum(sequence.beam is not None for sequence in scheduler.sequences.values())
    here = len(scheduler.sequences) - beams + len(scheduler.beams)
    if stats.num_accepted != ended + here:
        _fail(13, f"{stats.num_accepted} accepted, {ended} ended, {here} here")


def _idle(scheduler: Scheduler) -> None:
    """Without requests nothing is held."""
    left = {
        "blocks": scheduler.pool.num_usable - scheduler.pool.num_free,
        "rows": len(scheduler.table.order),
        "waiting": len(scheduler.waiting),
        "suspects": scheduler.num_suspects,
    }
    for what, count in left.items():
        if count:
            _fail(9, f"no request is here, but {count} {what} are left", "pool")
