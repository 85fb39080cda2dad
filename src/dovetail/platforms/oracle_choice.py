"""How the oracle honours what restricts its choice: rules of rows, masks, drafts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dovetail.core.batch import Batch, JoinedRow, TokenMasks
from dovetail.core.faults import fault
from dovetail.core.plugins.registry import describe_error
from dovetail.core.sampling.oracle import HashArray, TokenRule, parts
from dovetail.core.types import BoolArray, IndexArray, IntArray

__all__ = ["RowRules", "accepted", "masked", "proposals"]


class RowRules:
    """Allowed tokens and ``min_tokens`` of rows. Biases and penalties change nothing here."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._joined: dict[int, JoinedRow] = {}

    def join(self, joined: JoinedRow) -> None:
        """Take over a row."""
        self._joined.pop(joined.row, None)
        if joined.params.min_tokens or joined.params.allowed_token_ids:
            self._joined[joined.row] = joined

    def shape(
        self, chosen: IntArray, rows: IndexArray, num_generated: IntArray, hashes: HashArray
    ) -> dict[int, str]:
        """Replace tokens that their row may not be given. All arrays are (G,).

        Returns:
            Why rows failed, by row.
        """
        failures: dict[int, str] = {}
        for place, row in enumerate(rows.tolist()):
            if (joined := self._joined.get(row)) is not None:
                try:
                    fault("sampler.row", joined.request_id)
                    allowed = self._allowed(joined, int(num_generated[place]))
                    if chosen[place] not in allowed:
                        chosen[place] = allowed[int(hashes[place] % np.uint64(len(allowed)))]
                except Exception as error:
                    failures[row] = describe_error(error)
        return failures

    def _allowed(self, joined: JoinedRow, num_generated: int) -> Sequence[int]:
        allowed = joined.params.allowed_token_ids or range(self._vocab_size)
        if num_generated < joined.params.min_tokens:
            return [t for t in allowed if t not in joined.stop_token_ids]
        return allowed


def masked(chosen: IntArray, hashes: HashArray, masks: TokenMasks, vocab_size: int) -> None:
    """Replace tokens that a mask forbids by one that it allows, drawn by the hash."""
    bits = np.unpackbits(masks.bits.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size]
    for place, allowed_V in zip(masks.places.tolist(), bits, strict=True):
        if not allowed_V[chosen[place]]:
            allowed = np.flatnonzero(allowed_V)
            chosen[place] = allowed[int(hashes[place] % np.uint64(len(allowed)))]


def accepted(
    batch: Batch, chosen: IntArray, token_ids: npt.NDArray[np.int64]
) -> tuple[IntArray, IntArray, BoolArray]:
    """Of each row the longest beginning of its drafts that was chosen too, and one token more.

    Args:
        batch: The step.
        chosen: (G,) the token chosen at each place.
        token_ids: (T,) the tokens of the step, drafts included.

    Returns:
        (S, W) tokens, (S,) how many are valid, and (G,) which places these are.
    """
    num_rows = len(batch.sampled)
    if batch.num_drafts is None:
        return chosen[:, None], np.ones(num_rows, np.int32), np.ones(num_rows, np.bool_)
    counts = batch.num_drafts + 1
    starts = np.cumsum(counts) - counts
    index = batch.logit_index
    out = np.zeros((num_rows, int(counts.max()) if num_rows else 1), np.int32)
    num_tokens, kept = np.ones(num_rows, np.int32), np.zeros(len(chosen), np.bool_)
    for i, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        agreed = 0
        while agreed < count - 1 and token_ids[index[start + agreed + 1]] == chosen[start + agreed]:
            agreed += 1
        num_tokens[i] = agreed + 1
        kept[start : start + agreed + 1] = True
        out[i, : agreed + 1] = chosen[start : start + agreed + 1]
    return out, num_tokens, kept


def proposals(
    rule: TokenRule, hashes: HashArray, lengths: npt.NDArray[np.int64], count: int, quality: float
) -> IntArray:
    """Drafts (S, ``count``) for prefixes with these hashes and lengths; a share of them is right.

    Right for greedy requests, that is: the noise of later positions is not known here.
    """
    state, out = hashes.copy(), np.zeros((len(hashes), count), np.int32)
    no_noise = np.zeros(len(hashes), np.float32)
    for k in range(count):
        tokens = rule.choose(state, no_noise)
        state = state + parts(tokens, lengths + k)
        wrong = (state >> np.uint64(40)) >= np.uint64(quality * (1 << 24))
        out[:, k] = np.where(wrong, (tokens + 1) % rule.vocab_size, tokens)
    return out
