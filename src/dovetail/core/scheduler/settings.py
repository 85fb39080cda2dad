"""What the scheduler is told, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.core.config.speculative import SpeculativeConfig

__all__ = ["SchedulerConfig", "SchedulerStats"]


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits and policies, all decided."""

    num_blocks: int
    """Size of the pool, block 0 included."""
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    window: int | None = None
    """No layer looks back further than this many positions; None: some layer sees them all."""
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    mixed_batches: bool = True
    """Prefill and decode may share a step; otherwise they take turns."""
    policy: str = "fcfs"
    """``fcfs`` or ``priority``."""
    speculation: SpeculativeConfig | None = None
    priority_ageing_seconds: float | None = None
    """Seconds of waiting that are worth one priority; None: waiting changes nothing."""
    max_preemptions: int = 4
    """A request that was sent back to the queue this often is not sent back again."""
    max_bypasses: int = 8
    """Requests behind it that may start before a request for which there are no blocks yet."""


@dataclass(kw_only=True)
class SchedulerStats:
    """Counters since start."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_accepted: int = 0
    """Requests taken up: those that ended in one of three ways, and those that are here."""
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
