"""How many KV blocks one sequence takes."""

from __future__ import annotations

__all__ = ["blocks_for", "most_blocks"]

_SLACK = 2
"""Blocks that are held only in part: where the window starts, and where a step ahead ends."""


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold ``num_tokens`` positions."""
    return -(-num_tokens // block_size)


def most_blocks(
    num_tokens: int, block_size: int, window: int | None, max_tokens_per_step: int
) -> int:
    """The most blocks that a sequence of ``num_tokens`` holds at any time.

    Where no layer looks back further than ``window`` positions, what lies before the window is
    given back from step to step, and the length of the sequence does not matter.
    """
    whole = blocks_for(num_tokens, block_size)
    if window is None:
        return whole
    return min(whole, blocks_for(window + max_tokens_per_step, block_size) + _SLACK)
