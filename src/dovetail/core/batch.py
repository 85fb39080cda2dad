"""What one step computes, and what it gives back. Numpy only, complete at construction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from dovetail.core.request import SamplingParams
from dovetail.core.types import BoolArray, FloatArray, IndexArray, IntArray

__all__ = [
    "Batch",
    "JoinedRow",
    "LogprobArrays",
    "PromptLogprobNeed",
    "SamplingBatch",
    "StepOutput",
    "TokenMasks",
]


@dataclass(frozen=True, kw_only=True)
class JoinedRow:
    """A request that takes a row: what the runner keeps for it until the row is given away again.

    A row is given away by the next ``JoinedRow`` that names it; there is no message for leaving.
    """

    row: int
    token_ids: IntArray
    """Prompt, then the tokens generated so far (after preemption, or on another engine process)."""
    num_prompt_tokens: int
    params: SamplingParams
    stop_token_ids: tuple[int, ...]
    """Tokens that may not be chosen before ``params.min_tokens`` tokens were."""
    request_id: int = 0
    """``Request.id``, for messages and fault points."""


@dataclass(frozen=True, kw_only=True)
class TokenMasks:
    """Tokens that may be chosen, for the places that are not free to choose any."""

    places: IntArray
    """(M,) indices into the G places that get a token, ascending."""
    bits: IntArray
    """(M, ceil(V / 32)) one bit per token, lowest first: 1 where the token is allowed."""


@dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """How each token is chosen. Arrays of shape (G,), in the order of ``Batch.logit_index``.

    A row without drafts has one place, the token after its last known one.
    """

    temperature: FloatArray
    """0 means greedy for that row."""
    top_k: IntArray
    """The vocabulary size where all tokens are kept."""
    top_p: FloatArray
    min_p: FloatArray
    uniform: FloatArray
    """The row's noise for this position, in [0, 1): a function of (seed, position) only."""
    num_generated: IntArray
    """Tokens generated before this one."""
    all_greedy: bool
    """Every row is greedy: the arrays above need not be read."""
    restricts: bool
    """Some row has top_k, top_p or min_p."""
    shapes_logits: bool
    """Some row has ``SamplingParams.shapes_logits`` (see ``JoinedRow.params``): penalties, a bias,
    allowed tokens, bad words, logits processors or min_tokens."""
    num_logprobs: int | None
    """Alternatives wanted per token, the most of any row; None if no row wants any."""
    masks: TokenMasks | None = None

    @classmethod
    def greedy(cls, num_places: int) -> SamplingBatch:
        """The likeliest token of each place, and nothing else."""
        floats, ints = np.zeros(num_places, np.float32), np.zeros(num_places, np.int32)
        return cls(
            temperature=floats,
            top_k=ints,
            top_p=floats + 1,
            min_p=floats,
            uniform=floats,
            num_generated=ints,
            all_greedy=True,
            restricts=False,
            shapes_logits=False,
            num_logprobs=None,
        )


@dataclass(frozen=True, kw_only=True)
class PromptLogprobNeed:
    """Positions whose next token is known and whose log-probability is wanted, shape (N,) each."""

    token_index: IntArray
    """Index into the T tokens of the step."""
    target: IntArray
    """The token that follows."""
    num_logprobs: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step. R rows in order, T tokens one row after another; a row computes at least one token.

    Rows are stable: a request keeps its row, and the runner its state under that number, from the
    step that names it in ``joined`` until another request joins the same row.

    A batch that was padded (``core/buckets.py``) has rows without tokens behind the others, and
    tokens behind those of all rows, at position 0 of block 0. What is computed for them is void.
    """

    step: int
    rows: IndexArray
    """(R,) the row of each request, in the order in which the tokens follow."""
    query_lens: IntArray
    """(R,) tokens that this step computes for the row."""
    context_lens: IntArray
    """(R,) tokens of the row whose keys and values are in the cache already."""
    block_tables: IntArray
    """(R, M) KV blocks of each row, in order of position; beyond the row's last block: 0."""
    token_ids: IntArray
    """(T,) the tokens to compute. Entries named by ``carried`` are 0 and must be replaced."""
    carried: IndexArray
    """(C,) indices into ``token_ids`` that take the token which their row sampled last."""
    carried_rows: IndexArray
    """(C,) the row of each of them."""
    sampled: IndexArray
    """(S,) indices into the R rows that get a token: those whose last known token is computed."""
    num_drafts: IntArray | None = None
    """(S,) how many of the row's last tokens in this step are drafts: guessed, not known. Each
    is checked against the token that is chosen in its place, and what follows the first wrong
    one is void. None: there are no drafts."""
    num_drafts_wanted: IntArray | None = None
    """(S,) the most drafts that the runner's draft model should propose for the row's next step;
    so many positions after this step's have a KV block. None: no drafts are wanted."""
    sampling: SamplingBatch
    joined: tuple[JoinedRow, ...] = ()
    """Rows that are taken over before the step."""
    copies: IntArray
    """(n, 2) pairs (from, to) of blocks to copy before the step: copy-on-write."""
    prompt_logprobs: PromptLogprobNeed | None = None
    num_padding: int = 0
    """Tokens at the end of the T that belong to no row."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @cached_property
    def query_starts(self) -> IntArray:
        """(R + 1,) where each row's tokens start among the T tokens."""
        starts = np.zeros(len(self.rows) + 1, np.int32)
        np.cumsum(self.query_lens, out=starts[1:])
        return starts

    @cached_property
    def row_of_token(self) -> IntArray:
        """(T,) index into the R rows of each token; the last row for those of no row."""
        rows = np.repeat(np.arange(len(self.rows), dtype=np.int32), self.query_lens)
        return _extended(rows, self.num_padding, len(self.rows) - 1)

    @cached_property
    def positions(self) -> IntArray:
        """(T,) position of each token in its sequence, from 0."""
        if len(self.token_ids) == len(self.rows):
            return self.context_lens
        num_tokens = len(self.token_ids) - self.num_padding
        within = np.arange(num_tokens, dtype=np.int32) - self.query_starts[:-1].repeat(
            self.query_lens
        )
        positions = within + self.context_lens.repeat(self.query_lens)
        return _extended(positions, self.num_padding, 0)

    @cached_property
    def sequence_lens(self) -> IntArray:
        """(R,) tokens of the row in the cache once this step is done."""
        return self.context_lens + self.query_lens

    @cached_property
    def last_token_index(self) -> IntArray:
        """(S,) index into the T tokens of the last token of each sampled row."""
        return self.query_starts[1:][self.sampled] - 1

    @cached_property
    def logit_index(self) -> IntArray:
        """(G,) index into the T tokens of every token whose successor is chosen in this step.

        Row after row: the last known token, then the row's drafts.
        """
        if self.num_drafts is None:
            return self.last_token_index
        counts = self.num_drafts + 1
        ends = np.cumsum(counts)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - (ends - counts).repeat(counts)
        index: IntArray = (self.last_token_index - self.num_drafts).repeat(counts) + within
        return index.astype(np.int32)

    def slots(self, block_size: int) -> IntArray:
        """(T,) where each token's key and value go: block number times block size plus offset."""
        positions = self.positions
        blocks = self.block_tables[self.row_of_token, positions // block_size]
        slots = blocks * block_size + positions % block_size
        if self.num_padding:
            slots[-self.num_padding :] = 0
        return slots


def _extended(array: IntArray, count: int, value: int) -> IntArray:
    return np.concatenate((array, np.full(count, value, np.int32))) if count else array


@dataclass(frozen=True, kw_only=True)
class LogprobArrays:
    """Log-probabilities of N positions: the chosen (or next) token first, then the likeliest."""

    token_ids: IntArray
    """(N, 1 + k)"""
    logprobs: FloatArray
    """(N, 1 + k)"""
    ranks: IntArray
    """(N,) rank of the first column's token; 1 is the likeliest."""


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step produced, in the order of ``Batch.sampled``."""

    token_ids: IntArray
    """(S, W) new tokens per row; W is 1 plus the most drafts of any row."""
    num_tokens: IntArray
    """(S,) how many of the W are valid: the accepted drafts and the token after them, 1..W."""
    finite: BoolArray
    """(S,) False where the logits held NaN or infinity: that request alone has failed."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """Why other requests alone have failed, by index into S."""
    drafts: IntArray | None = None
    """(S, k) what the draft model proposes to come next; -1 from where it proposes nothing."""
    logprobs: LogprobArrays | None = None
    """N = G; of a row, the places up to its last accepted token mean something."""
    prompt_logprobs: LogprobArrays | None = None
    """N as in ``Batch.prompt_logprobs``."""
