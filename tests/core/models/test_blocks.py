from __future__ import annotations

from types import SimpleNamespace

import torch

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.ops import OpTable
from dovetail.core.models.blocks import Attention, Step, Unrotated, linear
from dovetail.platforms.torch.ops import DenseLinear, references
from tests.core.models.harness import dense_attention

HEADS, KV_HEADS, SIZE, WIDTH = 8, 4, 4, 16


def ops_for(share: int) -> SimpleNamespace:
    """Ops whose attention is given the heads of one device of ``share``."""
    table = OpTable(references()).bind()

    def attend(q, k, v, cache, plan, spec):
        own = AttentionSpec(
            layer=spec.layer,
            num_heads=spec.num_heads // share,
            num_kv_heads=spec.num_kv_heads // share,
            head_size=spec.head_size,
            scale=spec.scale,
        )
        return dense_attention(q, k, v, cache, plan, own)

    table.attention = attend
    return table


def test_attention_on_a_share_of_the_heads_adds_up() -> None:
    spec = AttentionSpec(layer=0, num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=SIZE, scale=0.5)
    rows = {"q": HEADS * SIZE, "k": KV_HEADS * SIZE, "v": KV_HEADS * SIZE}
    part = Attention(
        spec=spec,
        qkv=linear(rows, WIDTH, split="out"),
        out=linear({"o": WIDTH}, HEADS * SIZE, split="in"),
        positions=Unrotated(),
    )
    x = torch.randn(9, WIDTH)
    q, k, v = (torch.randn(count, WIDTH) for count in rows.values())
    out = torch.randn(WIDTH, HEADS * SIZE)

    def attended(index: int, share: int) -> torch.Tensor:
        qkv = torch.cat([weight.chunk(share)[index] for weight in (q, k, v)])
        weights = {
            "qkv": DenseLinear(qkv),
            "out": DenseLinear(out.chunk(share, dim=1)[index]),
            "positions": {},
        }
        return part(ops_for(share), weights, x, Step(plan=None), None)[0]

    halves = attended(0, 2) + attended(1, 2)
    assert torch.allclose(halves, attended(0, 1), atol=1e-4)
