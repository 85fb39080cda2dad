"""The oracle's step: prefix hashes in a fake KV cache, each read checked against the row's own.

All of a step is done with arrays; what loops is only what a request asks for beside its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dovetail.core.batch import Batch, JoinedRow, LogprobArrays, StepOutput
from dovetail.core.sampling.oracle import HashArray, TokenRule, parts
from dovetail.core.types import IndexArray, IntArray
from dovetail.platforms.oracle_choice import RowRules, accepted, masked, proposals
from dovetail.platforms.pretend import flat_logprobs

__all__ = ["OracleRows"]

_Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Tokens:
    """The T tokens of a step and what is known of each; arrays are (T,)."""

    ids: _Counts
    rows: IndexArray
    positions: IntArray
    slots: IntArray
    parts: HashArray
    hashes: HashArray
    """Of the prefix that ends with the token, as the cache has it."""


class OracleRows:
    """The rows of the batch, and the cache.

    Args:
        rule: How a hash becomes a token.
        num_blocks: Block 0 included.
        block_size: P.
        num_rows: Rows are numbered below this.
        max_len: The most tokens in one sequence.
        draft_quality: Share of the proposed drafts that are right.
    """

    def __init__(
        self,
        rule: TokenRule,
        *,
        num_blocks: int,
        block_size: int,
        num_rows: int,
        max_len: int,
        draft_quality: float = 0.7,
    ) -> None:
        self._rule = rule
        self._size = block_size
        self._quality = draft_quality
        self._kv_tokens = np.full(num_blocks * block_size, -1, np.int64)
        self._kv_hashes = np.zeros(num_blocks * block_size, np.uint64)
        self._writers = np.zeros(num_blocks * block_size, np.int32)
        self._true = np.zeros((num_rows, max_len + 2), np.uint64)
        """Hash of the first n tokens of each row, by n, as far as they are known."""
        self._num_true = np.full(num_rows, -1, np.int64)
        """How far that is; -1: nobody has joined the row."""
        self._last = np.zeros(num_rows, np.int64)
        self._broken: dict[int, str] = {}
        """What was found wrong with a row, until it can be told."""
        self._rules = RowRules(rule.vocab_size)

    def step(self, batch: Batch) -> StepOutput:
        """Compute the batch; what is wrong with a row is in ``StepOutput.failures``."""
        for joined in batch.joined:
            self._join(joined)
        self._copy(batch.copies)
        self._check_context(batch)
        tokens = self._hash(batch)
        self._check_tokens(tokens)
        self._write(tokens)
        return self._answer(batch, tokens)

    def _join(self, joined: JoinedRow) -> None:
        row, ids = joined.row, joined.token_ids
        self._true[row, 1 : len(ids) + 1] = np.cumsum(parts(ids, np.arange(len(ids))))
        self._num_true[row] = len(ids)
        self._broken.pop(row, None)
        self._rules.join(joined)

    def _copy(self, copies: IntArray) -> None:
        if len(copies):
            tokens, hashes = self._blocks(self._kv_tokens), self._blocks(self._kv_hashes)
            for source, target in copies.tolist():
                tokens[target], hashes[target] = tokens[source], hashes[source]

    def _blocks(self, slots: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return slots.reshape(-1, self._size)

    def _check_context(self, batch: Batch) -> None:
        """Read all the KV that the rows attend to. Block 0 stands for what left a window."""
        rows, context, tables = batch.rows, batch.context_lens, batch.block_tables
        for i in np.flatnonzero(context > self._num_true[rows]).tolist():
            self._note(int(rows[i]), int(context[i]), "is computed beyond the tokens it was given")
        ends = (np.arange(tables.shape[1]) + 1) * self._size
        whole = (ends <= context[:, None]) & (tables > 0)
        bound = np.minimum(ends, self._true.shape[1] - 1)
        found = self._kv_hashes[tables * self._size + self._size - 1]
        wrong = whole & (found != self._true[rows[:, None], bound])
        for i, index in np.argwhere(wrong).tolist():
            self._note_block(batch, i, index, int(ends[index]) - 1)
        tails = np.flatnonzero(context % self._size)
        last = context[tails] - 1
        blocks = tables[tails, last // self._size]
        slots = blocks * self._size + last % self._size
        bad = self._kv_hashes[slots] != self._true[rows[tails], context[tails]]
        for k in np.flatnonzero(bad).tolist():
            i = int(tails[k])
            self._note_block(batch, i, int(last[k]) // self._size, int(last[k]))

    def _note_block(self, batch: Batch, i: int, index: int, position: int) -> None:
        block = int(batch.block_tables[i, index])
        token = int(self._kv_tokens[block * self._size + position % self._size])
        holds = f"holds token {token} of another prefix" if token >= 0 else "was never written"
        self._note(int(batch.rows[i]), position, f"reads block {block}, which {holds}")

    def _note(self, row: int, position: int, what: str) -> None:
        self._broken.setdefault(row, f"I19: row {row} at position {position} {what}")

    def _hash(self, batch: Batch) -> _Tokens:
        ids = batch.token_ids.astype(np.int64)
        ids[batch.carried] = self._last[batch.carried_rows]
        positions, lens = batch.positions, batch.query_lens
        added = parts(ids, positions)
        sums = np.cumsum(added)
        starts = batch.query_starts[:-1]
        base = self._true[batch.rows, batch.context_lens]
        hashes = sums + (base - (sums[starts] - added[starts])).repeat(lens)
        return _Tokens(
            ids,
            batch.rows[batch.row_of_token],
            positions,
            batch.slots(self._size),
            added,
            hashes,
        )

    def _check_tokens(self, tokens: _Tokens) -> None:
        """Where a row's token is known, the batch must have that one."""
        known = tokens.positions < self._num_true[tokens.rows]
        wrong = known & (self._true[tokens.rows, tokens.positions + 1] != tokens.hashes)
        for t in np.flatnonzero(wrong).tolist():
            row, position = int(tokens.rows[t]), int(tokens.positions[t])
            self._note(row, position, f"computes token {tokens.ids[t]}, which is not its own")

    def _write(self, tokens: _Tokens) -> None:
        """Write the KV; two tokens in one slot, or one in block 0, are found."""
        self._kv_tokens[tokens.slots] = tokens.ids
        self._kv_hashes[tokens.slots] = tokens.hashes
        numbers = np.arange(len(tokens.ids), dtype=np.int32)
        self._writers[tokens.slots] = numbers
        lost = (self._writers[tokens.slots] != numbers) | (tokens.slots < self._size)
        for t in np.flatnonzero(lost).tolist():
            row, position, slot = int(tokens.rows[t]), int(tokens.positions[t]), tokens.slots[t]
            self._note(row, position, f"writes slot {slot}, which another token has or nobody may")

    def _answer(self, batch: Batch, tokens: _Tokens) -> StepOutput:
        sampling, places = batch.sampling, batch.logit_index
        hashes = tokens.hashes[places]
        noise = np.where(sampling.temperature > 0, sampling.uniform, np.float32(0))
        chosen = self._rule.choose(hashes, noise)
        if sampling.shapes_logits:
            rows, generated = tokens.rows[places], sampling.num_generated
            for row, reason in self._rules.shape(chosen, rows, generated, hashes).items():
                self._broken.setdefault(row, reason)
        if sampling.masks is not None:
            masked(chosen, hashes, sampling.masks, self._rule.vocab_size)
        token_ids, num_tokens, kept = accepted(batch, chosen, tokens.ids)
        self._learn(tokens, places[kept], chosen[kept])
        rows = batch.rows[batch.sampled]
        if len(rows):
            self._last[rows] = token_ids[np.arange(len(rows)), num_tokens - 1]
        return StepOutput(
            token_ids=token_ids,
            num_tokens=num_tokens,
            finite=np.ones(len(rows), np.bool_),
            failures=self._failures(rows),
            drafts=self._drafts(rows, batch.num_drafts_wanted),
            logprobs=self._logprobs(batch, chosen),
            prompt_logprobs=self._prompt_logprobs(batch),
        )

    def _learn(self, tokens: _Tokens, places: IntArray, chosen: IntArray) -> None:
        """The chosen tokens are the row's own from now on. ``places`` and ``chosen`` are (K,)."""
        rows, after = tokens.rows[places], tokens.positions[places] + 1
        self._true[rows, after + 1] = tokens.hashes[places] + parts(chosen, after)
        self._num_true[rows] = after + 1

    def _drafts(self, rows: IndexArray, wanted: IntArray | None) -> IntArray | None:
        """Proposals (S, k): as many as are wanted of each row, then -1."""
        if wanted is None or not wanted.any():
            return None
        lengths, most = self._num_true[rows], int(wanted.max())
        drafts = proposals(self._rule, self._true[rows, lengths], lengths, most, self._quality)
        drafts[np.arange(most) >= wanted[:, None]] = -1
        return drafts

    def _failures(self, rows: IndexArray) -> dict[int, str]:
        if not self._broken:
            return {}
        numbered = enumerate(rows.tolist())
        return {i: self._broken.pop(row) for i, row in numbered if row in self._broken}

    def _logprobs(self, batch: Batch, chosen: IntArray) -> LogprobArrays | None:
        wanted = batch.sampling.num_logprobs
        return None if wanted is None else flat_logprobs(chosen, wanted, self._rule.vocab_size)

    def _prompt_logprobs(self, batch: Batch) -> LogprobArrays | None:
        need = batch.prompt_logprobs
        if need is None:
            return None
        return flat_logprobs(need.target, need.num_logprobs, self._rule.vocab_size)
