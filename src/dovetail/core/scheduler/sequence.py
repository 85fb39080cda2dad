"""One sequence on its way through the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dovetail.core.kv.prefix import root
from dovetail.core.request import Request
from dovetail.core.types import IntArray

if TYPE_CHECKING:
    from dovetail.core.scheduler.hypotheses import Beam

__all__ = ["Sequence"]


class Sequence:
    """A request and everything the scheduler keeps for it while it waits or runs.

    While it runs, its counters and tokens live in the ``RowTable`` under ``row``; while it waits,
    ``token_ids`` holds them.

    Args:
        request: What is asked for.
        token_ids: Its tokens so far; None takes the request's prompt and what it emitted before.
    """

    def __init__(self, request: Request, token_ids: IntArray | None = None) -> None:
        self.request = request
        if token_ids is None:
            token_ids = np.array([*request.prompt_token_ids, *request.emitted], dtype=np.int32)
        self.token_ids: IntArray = token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.row: int | None = None
        self.blocks: list[int] = []
        """KV blocks in order of position. Not empty while waiting only after a fork."""
        self.num_released = 0
        """The first of ``blocks`` that were given back, for they lie before the model's window; 0
        stands in their place."""
        self.num_shared_tokens = 0
        """Tokens computed in ``blocks`` when it was forked from its parent."""
        self.root = root(request.cache_salt)
        self.chain: list[bytes] = []
        """Names of its full blocks, as far as they were needed."""
        self.num_registered = 0
        """Blocks of the chain that are in the prefix index, or need not be."""
        self.num_cached_tokens: int | None = None
        """Prompt tokens found in the prefix cache when it first ran."""
        self.num_prompt_logprobs = 0
        """Positions of the prompt whose log-probabilities were sent."""
        self.children: list[Sequence] = []
        """Sequences that wait for this one's prefill, to share it."""
        self.has_started = bool(request.emitted)
        """It has its first token: nobody can share its prefill any more."""
        self.num_preemptions = 0
        """Times that it lost its row and its blocks to others."""
        self.num_bypasses = 0
        """Sequences that started before it although they came after it."""
        self.beam: Beam | None = None
        """What it stands for in a beam search."""

    @property
    def held(self) -> list[int]:
        """The KV blocks that it refers to."""
        return self.blocks[self.num_released :] if self.num_released else self.blocks

    @property
    def needs_known(self) -> bool:
        """Whether the host has to see each token before the next one can be chosen."""
        return self.beam is not None or bool(self.request.params.logits_processors)

    @property
    def rests(self) -> bool:
        """Whether it is a beam whose step is done, and that waits for those beside it."""
        return self.beam is not None and self.beam.candidates is not None

    @property
    def total(self) -> int:
        """Length, prompt included, at which it ends."""
        max_tokens = self.request.params.max_tokens or 0
        return self.num_prompt_tokens + max_tokens
