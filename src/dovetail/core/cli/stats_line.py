"""One line on what the engine did since the last one; nothing while it is idle."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dovetail.core.engine.api import EngineStats

__all__ = ["stats_line"]


def stats_line(before: EngineStats, now: EngineStats, seconds: float) -> str | None:
    """Rates over an interval and gauges at its end; None if nothing happened.

    Args:
        before: Counters at the start of the interval.
        now: Counters and gauges at its end.
        seconds: Its length.
    """
    prompt = max(now.num_prompt_tokens - before.num_prompt_tokens, 0)
    generated = max(now.num_generation_tokens - before.num_generation_tokens, 0)
    if not (prompt or generated or now.num_running or now.num_waiting):
        return None
    parts = [
        f"Avg prompt throughput: {prompt / seconds:.1f} tokens/s",
        f"Avg generation throughput: {generated / seconds:.1f} tokens/s",
        f"Running: {now.num_running} reqs",
        f"Waiting: {now.num_waiting} reqs",
    ]
    if now.num_blocks:
        used = 1 - now.num_free_blocks / now.num_blocks
        parts.append(f"KV cache usage: {100 * used:.1f}%")
    asked = now.prefix_cache_queries - before.prefix_cache_queries
    if asked > 0:
        hits = now.prefix_cache_hits - before.prefix_cache_hits
        parts.append(f"Prefix cache hit rate: {100 * hits / asked:.1f}%")
    preempted = now.num_preemptions - before.num_preemptions
    if preempted > 0:
        parts.append(f"Preempted: {preempted}")
    guessed = now.num_draft_tokens - before.num_draft_tokens
    if guessed > 0:
        right = now.num_accepted_tokens - before.num_accepted_tokens
        parts.append(f"Drafts accepted: {100 * right / guessed:.1f}%")
    return ", ".join(parts)
