"""The pool and the blocks of sequences against a model of a few dictionaries, by random walks."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dovetail.core.errors import InvariantError
from dovetail.core.kv.pool import BlockPool
from dovetail.core.request import Request, SamplingParams
from dovetail.core.scheduler.blocks import SequenceBlocks
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.scheduler.settings import SchedulerConfig

SIZE, NUM_BLOCKS, NUM_ROWS, MAX_LEN = 3, 14, 4, 36
CONFIG = SchedulerConfig(
    num_blocks=NUM_BLOCKS,
    block_size=SIZE,
    max_model_len=MAX_LEN,
    max_num_seqs=NUM_ROWS,
    max_num_batched_tokens=MAX_LEN,
    vocab_size=10,
)
PICK = st.integers(0, 100)
FEW = st.sampled_from([0, 1])
"""An alphabet so small that prefixes are shared all the time."""


class Machine(RuleBasedStateMachine):
    """The model: what each block holds, slot by slot, and the tokens of each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.table = RowTable(NUM_ROWS, MAX_LEN, SIZE, 10)
        self.blocks = SequenceBlocks(self.pool, self.table, CONFIG)
        self.content: dict[int, list[Any]] = {b: [None] * SIZE for b in range(NUM_BLOCKS)}
        self.running: list[Sequence] = []
        self.forks: list[Sequence] = []
        self.next_id = 1

    # What the scheduler does with them.

    def make(self, tokens: list[int], salt: str) -> Sequence:
        request = Request(
            id=self.next_id,
            prompt_token_ids=tokens,
            params=SamplingParams(max_tokens=MAX_LEN - len(tokens)),
            stop_token_ids=[],
            seed=0,
            arrival_time=0.0,
            cache_salt=salt,
        )
        self.next_id += 1
        return Sequence(request)

    def start(self, sequence: Sequence) -> bool:
        """Give it a row and compute all its tokens, if there is room."""
        prefix = self.blocks.find_prefix(sequence)
        if not self.table.num_vacant or prefix.num_needed > self.pool.num_free:
            return False
        self.blocks.hold(sequence, prefix)
        self.table.join(sequence, prefix.num_computed)
        self.running.append(sequence)
        self.compute(sequence, len(sequence.token_ids) - prefix.num_computed)
        return True

    def compute(self, sequence: Sequence, count: int) -> None:
        rows, grants = np.array([sequence.row], np.int32), np.array([count], np.int32)
        for source, target in self.blocks.extend(rows, grants):
            self.content[target] = list(self.content[source])
        start = int(self.table.num_computed[sequence.row])
        for position in range(start, start + count):
            token = int(self.table.tokens[sequence.row, position])
            block = sequence.blocks[position // SIZE]
            held = self.pool.references(block)
            assert held == 1, f"block {block} is written while {held} hold it"
            assert self.pool.name_of(block) is None, f"block {block} is written under its name"
            self.content[block][position % SIZE] = (sequence.request.cache_salt, token)
        self.table.num_computed[sequence.row] += count

    def leave(self, sequence: Sequence) -> None:
        self.blocks.register_all(sequence)
        self.table.leave(sequence)
        self.blocks.drop(sequence)
        self.running.remove(sequence)

    # The rules.

    @rule(tokens=st.lists(FEW, min_size=1, max_size=20), salt=st.sampled_from(["", "x"]))
    def admit(self, tokens: list[int], salt: str) -> None:
        self.start(self.make(tokens, salt))

    @precondition(lambda self: self.running)
    @rule(pick=PICK, tokens=st.lists(FEW, min_size=1, max_size=7))
    def grow(self, pick: int, tokens: list[int]) -> None:
        sequence = self.running[pick % len(self.running)]
        row = sequence.row
        known = int(self.table.num_known[row])
        tokens = tokens[: MAX_LEN - known]
        rows, grants = np.array([row], np.int32), np.array([len(tokens)], np.int32)
        if not tokens or self.blocks.missing(rows, grants) > self.pool.num_free:
            return
        self.table.tokens[row, known : known + len(tokens)] = tokens
        self.table.num_known[row] += len(tokens)
        self.table.num_tokens[row] += len(tokens)
        self.compute(sequence, len(tokens))

    @precondition(lambda self: self.running)
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        parent = self.running[pick % len(self.running)]
        child = self.make(parent.request.prompt_token_ids, parent.request.cache_salt)
        self.blocks.fork(parent, child, parent.num_prompt_tokens - 1)
        self.forks.append(child)

    @precondition(lambda self: self.forks)
    @rule(pick=PICK)
    def start_fork(self, pick: int) -> None:
        child = self.forks[pick % len(self.forks)]
        if self.start(child):
            self.forks.remove(child)

    @precondition(lambda self: self.forks)
    @rule(pick=PICK)
    def abort_fork(self, pick: int) -> None:
        self.blocks.drop(self.forks.pop(pick % len(self.forks)))

    @precondition(lambda self: self.running)
    @rule(pick=PICK, again=st.booleans())
    def end_or_preempt(self, pick: int, again: bool) -> None:
        sequence = self.running[pick % len(self.running)]
        self.leave(sequence)
        if again:
            self.start(sequence)

    @rule()
    def evict_all_cached(self) -> None:
        self.pool.forget_cached()

    @rule(more=st.integers(1, 5))
    def too_many_blocks_change_nothing(self, more: int) -> None:
        before = self.state()
        with pytest.raises(InvariantError, match="I7"):
            self.pool.allocate(self.pool.num_free + more)
        assert self.state() == before

    @rule(count=st.integers(0, 3))
    def taken_and_given_back(self, count: int) -> None:
        if count <= self.pool.num_free:
            taken = self.pool.allocate(count)
            assert len(set(taken)) == count and 0 not in taken
            for block in taken:
                self.content[block] = [None] * SIZE
            self.pool.release(taken)

    @rule(pick=PICK)
    def a_double_release_is_an_error(self, pick: int) -> None:
        idle = [b for b in range(1, NUM_BLOCKS) if not self.pool.references(b)]
        if idle:
            before = self.state()
            with pytest.raises(InvariantError, match="I3"):
                self.pool.release([idle[pick % len(idle)]])
            assert self.state() == before

    def state(self) -> object:
        references = [self.pool.references(block) for block in range(NUM_BLOCKS)]
        names = [self.pool.name_of(block) for block in range(NUM_BLOCKS)]
        return references, names, self.pool.num_free

    # What must always hold.

    @invariant()
    def accounting(self) -> None:
        self.pool.check(s.blocks for s in [*self.running, *self.forks])
        held = {b for s in [*self.running, *self.forks] for b in s.blocks}
        assert self.pool.num_free == self.pool.num_usable - len(held)

    @invariant()
    def everybody_reads_its_own_tokens(self) -> None:
        for s in self.running:
            tokens = self.table.tokens[s.row, : self.table.num_computed[s.row]].tolist()
            self.check_content(s, tokens)
        for s in self.forks:
            self.check_content(s, s.token_ids[: s.num_shared_tokens].tolist())

    def check_content(self, sequence: Sequence, tokens: list[int]) -> None:
        for position, token in enumerate(tokens):
            found = self.content[sequence.blocks[position // SIZE]][position % SIZE]
            assert found == (sequence.request.cache_salt, token)

    @invariant()
    def names_say_what_is_in_the_block(self) -> None:
        """The last link of a name, at least: the salt and tokens that the block holds."""
        for s in self.running:
            salt = s.request.cache_salt.encode()
            name = sha256(len(salt).to_bytes(8, "little") + salt).digest()
            for block in s.blocks[: int(self.table.num_computed[s.row]) // SIZE]:
                tokens = np.array([token for _, token in self.content[block]], "<i4")
                name = sha256(name + tokens.tobytes()).digest()
                assert self.pool.name_of(block) in (None, name)


def walk(examples: int, *, phases: tuple[Phase, ...] = (Phase.generate, Phase.shrink)) -> None:
    """Random walks of 60 steps. The same ones each time."""
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=60,
            deadline=None,
            derandomize=True,
            database=None,
            phases=phases,
            report_multiple_bugs=False,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_walks() -> None:
    walk(150)
