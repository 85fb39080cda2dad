"""Which sizes of steps are recorded, and when a step is padded to one of them.

A record takes the host no time to speak of, and the device as long as its size asks for, whatever
part of it is padding. Op by op the device computes what there is, once the host has given it.
"""

from __future__ import annotations

__all__ = ["ALWAYS", "is_served", "recorded_shapes", "recorded_sizes"]

ALWAYS = 1024
"""Tokens up to which the host is taken to need longer than the device."""
_FEW_TOKENS = (16, 32, 64, 128, 256, 384, 512, 640, 768, 896, ALWAYS)
"""Of recorded steps that do not only decode. The more there are, the more time padding costs, so
they come closer."""
_FEW_ROWS = (8, 64)
"""Of those: how many programs attend depends on the number of rows, used or not."""
_MANY_TOKENS = (1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
"""Of recorded steps where the host needs longer still. One row more or less is nothing to them."""
_PADDING = 16
"""Of so many tokens, one may always be padding."""


def recorded_sizes(most: int) -> tuple[int, ...]:
    """Numbers of rows, ascending, up to ``most``: the larger, the less that padding costs."""
    few = [size for size in (1, 2, 4) if size < most]
    steps = [*range(8, 64, 8), *range(64, 256, 16), *range(256, most, 32)]
    return (*few, *(size for size in steps if size < most), most)


def recorded_shapes(most_tokens: int, most_rows: int) -> tuple[tuple[int, int], ...]:
    """Numbers of tokens and rows of steps that do not only decode, ascending.

    Numbers of rows are ``recorded_sizes``, and smaller than that of tokens. Where a step may have
    no more tokens than the largest of these sizes, the most that it may have is one of them: so
    many it has whenever more is waiting.
    """
    few = [size for size in _FEW_TOKENS if size < most_tokens]
    many = [size for size in _MANY_TOKENS if size < most_tokens]
    if most_tokens <= _MANY_TOKENS[-1]:
        (few if most_tokens <= _FEW_TOKENS[-1] else many).append(most_tokens)
    rows = sorted({most_rows, *(size for size in _FEW_ROWS if size < most_rows)})
    shapes = [(size, count) for size in few for count in rows]
    shapes += [(size, most_rows) for size in many]
    return tuple((size, count) for size, count in shapes if count < size)


def is_served(tokens: int, record: int, even: int) -> bool:
    """Whether a step of so many tokens is padded to a record's, which are not fewer.

    Args:
        tokens: Of the step.
        record: Of the record.
        even: Tokens that take the device as long as the host takes over a step op by op.
    """
    return record <= max(even, ALWAYS) or (record - tokens) * _PADDING <= record
