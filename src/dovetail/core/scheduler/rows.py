"""The rows: one numpy array per counter, so that a step in which little happens costs little."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dovetail.core.batch import JoinedRow
from dovetail.core.errors import InvariantError
from dovetail.core.sampling.noise import hashed
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.scheduler.stops import StopTokens
from dovetail.core.types import FloatArray, IndexArray, IntArray

__all__ = ["FixedSampling", "RowTable"]


@dataclass(frozen=True)
class FixedSampling:
    """How some rows sample, as far as it does not change while they run. Arrays are (S,)."""

    temperature: FloatArray
    top_k: IntArray
    top_p: FloatArray
    min_p: FloatArray
    noise: npt.NDArray[np.uint64]
    """Where the noise of each starts: see ``sampling.noise.hashed``."""
    no_noise: FloatArray
    all_greedy: bool
    restricts: bool
    shapes_logits: bool
    num_logprobs: int | None


class RowTable:
    """State of the running sequences, indexed by row. A row is given to one sequence at a time.

    Counters of a row: ``num_computed <= num_tokens``, ``num_known <= num_tokens <= total``.
    ``num_tokens`` counts the tokens that are known plus those being sampled in steps under way;
    ``num_computed`` counts the tokens whose KV is written, or will be by steps under way.

    Behind its known tokens a row's ``tokens`` may hold drafts. While a step with drafts is under
    way ``num_computed`` counts them all; when it comes in, those that were wrong are taken back.
    """

    def __init__(self, num_rows: int, max_len: int, block_size: int, vocab_size: int) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        max_blocks = -(-max_len // block_size)
        self.tokens = np.zeros((num_rows, max_len), np.int32)
        self.blocks = np.zeros((num_rows, max_blocks), np.int32)
        self.num_blocks = np.zeros(num_rows, np.int32)
        self.num_released = np.zeros(num_rows, np.int32)
        """Blocks at the start that were given back: see ``Sequence.num_released``."""
        self.num_known = np.zeros(num_rows, np.int32)
        self.num_tokens = np.zeros(num_rows, np.int32)
        self.num_computed = np.zeros(num_rows, np.int32)
        self.num_prompt = np.zeros(num_rows, np.int32)
        self.total = np.zeros(num_rows, np.int32)
        self.request_id = np.zeros(num_rows, np.int64)
        self.epoch = np.zeros(num_rows, np.int64)
        """Counts the sequences that had the row: results for an earlier one are dropped."""
        self.shares_tail = np.zeros(num_rows, np.bool_)
        """The block that is written next may be shared and then has to be copied first."""
        self.needs_known = np.zeros(num_rows, np.bool_)
        """The next token is prepared on the host from those before it: no step ahead of them."""
        self.may_draft = np.zeros(num_rows, np.bool_)
        """Several tokens of the row may be chosen in one step."""
        self.has_grammar = np.zeros(num_rows, np.bool_)
        """Only tokens that the sequence's grammar allows may be chosen."""
        self.num_grammars = 0
        """Rows of which that is true."""
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int32)
        self.top_p = np.zeros(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.seed = np.zeros(num_rows, np.uint64)
        self.restricts = np.zeros(num_rows, np.bool_)
        self.shapes_logits = np.zeros(num_rows, np.bool_)
        self.wants_logprobs = np.zeros(num_rows, np.int32)
        """1 + number of alternatives; 0: none wanted."""
        self.wants_prompt_logprobs = np.zeros(num_rows, np.bool_)
        self.stops = StopTokens(num_rows)
        self.sequences: list[Sequence | None] = [None] * num_rows
        self._block_lists: list[list[int]] = [[] for _ in range(num_rows)]
        """``Sequence.blocks`` of each occupied row."""
        self.order: IndexArray = np.zeros(0, np.intp)
        """The occupied rows, in the order in which they were taken."""
        self._vacant = list(range(num_rows - 1, -1, -1))
        self._last_sampling: tuple[IndexArray, FixedSampling] | None = None
        """The rows of the last step, and how they sample; None once a row has changed hands."""

    @property
    def num_vacant(self) -> int:
        """Rows that nobody has."""
        return len(self._vacant)

    def at(self, row: int) -> Sequence:
        """The sequence that has the row."""
        sequence = self.sequences[row]
        if sequence is None:
            raise InvariantError("engine", f"row {row} is used but nobody has it")
        return sequence

    def join(self, sequence: Sequence, num_computed: int) -> JoinedRow:
        """Give a vacant row to a sequence whose first tokens are computed; its blocks are set."""
        row = self._vacant.pop()
        self._last_sampling = None
        known = len(sequence.token_ids)
        sequence.row = row
        self.sequences[row] = sequence
        self._block_lists[row] = sequence.blocks
        self.request_id[row] = sequence.request.id
        self.epoch[row] += 1
        self.tokens[row, :known] = sequence.token_ids
        self.num_known[row] = self.num_tokens[row] = known
        self.num_computed[row] = num_computed
        self.num_prompt[row] = sequence.num_prompt_tokens
        self.total[row] = sequence.total
        self.num_blocks[row] = len(sequence.blocks)
        self.num_released[row] = sequence.num_released
        self.blocks[row, : len(sequence.blocks)] = sequence.blocks
        self.blocks[row, len(sequence.blocks) :] = 0
        self.shares_tail[row] = bool(sequence.num_shared_tokens)
        self.has_grammar[row] = bool(sequence.request.grammar)
        self.num_grammars += bool(sequence.request.grammar)
        self.needs_known[row] = sequence.needs_known or self.has_grammar[row]
        self.may_draft[row] = not sequence.needs_known
        self._join_sampling(row, sequence)
        self.order = np.append(self.order, row)
        return JoinedRow(
            row=row,
            token_ids=sequence.token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens,
            params=sequence.request.params,
            stop_token_ids=tuple(sequence.request.stop_token_ids),
            request_id=sequence.request.id,
        )

    def _join_sampling(self, row: int, sequence: Sequence) -> None:
        params = sequence.request.params
        self.temperature[row] = 0.0 if params.is_greedy else params.temperature
        self.top_k[row] = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.seed[row] = sequence.request.seed % (1 << 64)
        self.restricts[row] = not params.is_greedy and (
            params.top_p < 1 or params.min_p > 0 or self.top_k[row] < self.vocab_size
        )
        self.shapes_logits[row] = params.shapes_logits
        self.wants_logprobs[row] = 0 if params.logprobs is None else params.logprobs + 1
        self.wants_prompt_logprobs[row] = params.prompt_logprobs is not None
        self.stops.set(row, sequence.request.stop_token_ids)

    def sampling_of(self, rows: IndexArray) -> FixedSampling:
        """How these rows sample. Kept from step to step while the rows are the same."""
        if self._last_sampling is not None and np.array_equal(self._last_sampling[0], rows):
            return self._last_sampling[1]
        temperature = self.temperature[rows]
        alternatives = int(self.wants_logprobs[rows].max()) if len(rows) else 0
        fixed = FixedSampling(
            temperature=temperature,
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            noise=hashed(self.seed[rows]),
            no_noise=np.zeros(len(rows), np.float32),
            all_greedy=not temperature.any(),
            restricts=bool(self.restricts[rows].any()),
            shapes_logits=bool(self.shapes_logits[rows].any()),
            num_logprobs=alternatives - 1 if alternatives else None,
        )
        self._last_sampling = (rows, fixed)
        return fixed

    def retract_token(self, row: int) -> None:
        """Forget the last known token; no step under way may compute or follow it."""
        self.num_known[row] -= 1
        self.num_tokens[row] -= 1

    def append_token(self, row: int, token_id: int) -> None:
        """Let a known token follow; no step under way may be about to choose it."""
        self.tokens[row, self.num_known[row]] = token_id
        self.num_known[row] += 1
        self.num_tokens[row] += 1

    def leave(self, sequence: Sequence) -> None:
        """Take the row back; the sequence keeps its tokens, known as far as they are."""
        row = sequence.row
        if row is None:
            return
        sequence.token_ids = self.tokens[row, : self.num_known[row]].copy()
        sequence.row = None
        self.sequences[row] = None
        self.num_grammars -= bool(sequence.request.grammar)
        self.has_grammar[row] = False
        self.epoch[row] += 1
        self.order = self.order[self.order != row]
        self._vacant.append(row)

    def add_blocks(self, row: int, blocks: list[int]) -> None:
        """Append blocks to a row and its sequence."""
        sequence = self.at(row)
        start = len(sequence.blocks)
        sequence.blocks.extend(blocks)
        self.blocks[row, start : start + len(blocks)] = blocks
        self.num_blocks[row] = start + len(blocks)

    def add_one_block_each(self, rows: IndexArray, blocks: list[int]) -> None:
        """Append one block to each of several rows and their sequences."""
        lists = self._block_lists
        for row, block in zip(rows.tolist(), blocks, strict=True):
            lists[row].append(block)
        self.blocks[rows, self.num_blocks[rows]] = blocks
        self.num_blocks[rows] += 1

    def replace_block(self, row: int, sequence: Sequence, index: int, block: int) -> None:
        """Point one entry of the row's block table to another block."""
        sequence.blocks[index] = block
        self.blocks[row, index] = block

    def release_blocks(self, row: int, sequence: Sequence, count: int) -> None:
        """Put block 0 in the place of the row's first ``count`` blocks."""
        sequence.blocks[:count] = [0] * count
        self.blocks[row, :count] = 0
        self.num_released[row] = sequence.num_released = count
