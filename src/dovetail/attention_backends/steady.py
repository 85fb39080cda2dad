"""Matrix products and functions whose bits do not depend on how much is computed in one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["in_place", "least_batch", "products"]

_GRAIN = 32768
"""Numbers that torch never shares out among threads (``at::internal::GRAIN_SIZE``)."""
_UNIT = 64
"""A multiple of what one round of any vector loop takes."""
_MOST = 256


def in_place(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Apply an elementwise function that works in place, on runs that leave vectors whole.

    Torch computes what is left at the end of a thread's run with the scalar library, whose last
    bit may differ.

    Args:
        function: Such as ``torch.exp_``.
        x: Contiguous; its last axis is a multiple of 64.
    """
    units, threads = x.view(-1, _UNIT), torch.get_num_threads()
    shared = len(units) - len(units) % threads
    if shared * _UNIT > (threads - 1) * _GRAIN:
        function(units[:shared])
        units = units[shared:]
    for run in torch.split(units, _GRAIN // _UNIT):
        function(run)


def products(a_NXY: Tensor, b_NYZ: Tensor, least: int, out_NXZ: Tensor) -> None:
    """N products of matrices, at least ``least`` of them in one call, into ``out_NXZ``."""
    missing = least - len(a_NXY)
    if missing <= 0:
        torch.bmm(a_NXY, b_NYZ, out=out_NXZ)
        return
    a, b = (torch.cat([x, x[:1].expand(missing, -1, -1)]) for x in (a_NXY, b_NYZ))
    out_NXZ.copy_(torch.bmm(a, b)[: len(a_NXY)])


@torch.inference_mode()
def least_batch(
    num_queries: int, head_size: int, num_keys: int, device: torch.device
) -> int | None:
    """The fewest products in one call whose bits are those of any larger number of them.

    A few products may each be shared out among threads, and sum in another order. This is found
    by trying, once for each shape.

    Returns:
        None if even large numbers differ.
    """
    return _least_batch(num_queries, head_size, num_keys, device, torch.get_num_threads())


@cache
def _least_batch(
    num_queries: int, head_size: int, num_keys: int, device: torch.device, threads: int
) -> int | None:
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(_MOST, *shape, generator=random).to(device)

    q, k, p = draw(num_queries, head_size), draw(num_keys, head_size), draw(num_queries, num_keys)
    scores, mixed = torch.bmm(q, k.transpose(1, 2)), torch.bmm(p, k)
    counts = [*range(1, min(4 * threads + 2, _MOST // 2)), _MOST // 2]
    least = 1
    for count in counts:
        for part in (slice(0, count), slice(_MOST - count, _MOST)):
            shared = k[part][:1].expand(count, -1, -1)
            if not (
                torch.equal(torch.bmm(q[part], k[part].transpose(1, 2)), scores[part])
                and torch.equal(torch.bmm(p[part], k[part]), mixed[part])
                and torch.equal(torch.bmm(q[part], shared.transpose(1, 2))[0], scores[part][0])
                and torch.equal(torch.bmm(p[part], shared)[0], mixed[part][0])
            ):
                least = count + 1
    return least if least <= counts[-1] else None
