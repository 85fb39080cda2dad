"""``rotary_attend`` is norms, rotation and ``attend`` in one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dovetail.attention_backends.reference import ReferenceAttention
from dovetail.attention_backends.triton.backend import TritonAttention
from dovetail.core.contracts.attention import RecordableAttention, RotaryAttention
from dovetail.core.contracts.ops import OpTable
from dovetail.platforms.torch.ops import references
from tests.attention_backends.sequences import Sequences
from tests.attention_backends.triton.work import CPU, TOLERANCE, make_work

LENGTHS = (3, 20)


def composed(work: Sequences, angles: tuple[Tensor, ...], norms: object) -> Tensor:
    """The op as it is derived from the others, over the readable backend."""
    backend = ReferenceAttention(CPU)
    ops = OpTable(references()).bind()
    ops.attention = backend.attend
    cache = backend.allocate(work.spec, work.need, work.num_blocks)
    plan = backend.plan(work.batch(work.whole()[0]), work.need)
    sides = (torch.cat(side) for side in (work.q, work.k, work.v))
    out, _ = ops.rotary_attention(*sides, angles, norms, cache, plan, work.spec)
    return out


@pytest.mark.parametrize(
    ("dtype", "weights", "half"),
    [
        ("float32", None, 8),
        ("float32", "same", 5),
        ("float16", None, 1),
        ("float16", "float32", 8),
        ("float16", "same", 8),
        ("float16", "same", 3),
    ],
)
def test_as_the_composed_op(
    dtype: str, weights: str | None, half: int, device: torch.device
) -> None:
    work = make_work(LENGTHS, dtype=dtype, heads=6, kv_heads=2)
    tokens, kind = sum(LENGTHS), getattr(torch, dtype if weights == "same" else "float32")
    phase = torch.rand(tokens, half, generator=torch.Generator().manual_seed(1)) * 6
    angles = (phase.cos(), phase.sin())
    norms = None
    if weights is not None:
        norms = (torch.linspace(0.5, 2, 16).to(kind), torch.linspace(1, -1, 16).to(kind), 1e-5)
    want = composed(work, angles, norms)

    backend = TritonAttention(device)
    assert isinstance(backend, RotaryAttention) and isinstance(backend, RecordableAttention)
    cache = backend.allocate(work.spec, work.need, work.num_blocks)
    plan = backend.plan(work.batch(work.whole()[0]), work.need)
    # Queries, keys and values as views of one array, as a fused projection gives them.
    sides = [torch.cat(side) for side in (work.q, work.k, work.v)]
    qkv = torch.cat([side.flatten(1) for side in sides], 1).to(device)
    views = [
        part.unflatten(1, (-1, 16)) for part in qkv.split([side[0].numel() for side in sides], 1)
    ]
    assert not any(view.is_contiguous() for view in views)
    there = None if norms is None else (norms[0].to(device), norms[1].to(device), norms[2])
    before = qkv.clone()
    got, _ = backend.rotary_attend(
        *views, tuple(angle.to(device) for angle in angles), there, cache, plan, work.spec
    )
    assert torch.equal(qkv, before)
    assert torch.allclose(got.cpu().float(), want.float(), atol=TOLERANCE[dtype])


def test_entries_must_be_neighbours(device: torch.device) -> None:
    work = make_work((4,))
    backend = TritonAttention(device)
    cache = backend.allocate(work.spec, work.need, work.num_blocks)
    plan = backend.plan(work.batch([(0, 0, 4)]), work.need)
    turned = work.q[0].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="neighbours"):
        backend.attend(turned, work.k[0], work.v[0], cache, plan, work.spec)
    with pytest.raises(ValueError, match="angles"):
        backend.rotary_attend(
            work.q[0], work.k[0], work.v[0], (turned,), None, cache, plan, work.spec
        )
    with pytest.raises(TypeError, match="another backend"):
        backend.attend(work.q[0], work.k[0], work.v[0], cache, object(), work.spec)
