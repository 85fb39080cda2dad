"""The backend against the readable one, in any pieces, padded or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dovetail_sim.attention import SimAttention
from dovetail_sim.device import Hardware
from torch import Tensor

from dovetail.attention_backends.reference import ReferenceAttention
from dovetail.core.batch import Batch
from dovetail.core.buckets import Buckets
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from tests.attention_backends.sequences import Sequences, make_need, make_spec

SIM = "sim:0"
CPU = torch.device("cpu")
LENGTHS = (1, 5, 16, 17, 100)
SPECS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one KV head": {"heads": 7, "kv_heads": 1, "size": 20},
    "window": {"window": 20},
    "window and soft cap": {"window": 60, "soft_cap": 5.0},
}
BUCKETS = Buckets(decode=(2, 8), tokens=(16, 128, 256), blocks=(4, 8))


class OnDevice:
    """The backend for queries, keys and values of the host; steps may be padded."""

    def __init__(self, buckets: Buckets | None = None) -> None:
        self.backend = SimAttention(torch.device(SIM))
        self.allocate = self.backend.allocate
        self.buckets = buckets

    def plan(self, batch: Batch, need: AttentionNeed) -> object:
        return self.backend.plan(self.buckets.pad(batch) if self.buckets else batch, need)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, plan: Any, spec: AttentionSpec
    ) -> Any:
        missing = len(plan.places_T) - len(q)
        q_T, k_T, v_T = (
            torch.cat([side, torch.full_like(side[:1], 9).expand(missing, -1, -1)]).to(SIM)
            for side in (q, k, v)
        )
        out, cache = self.backend.attend(q_T, k_T, v_T, cache, plan, spec)
        assert out[len(q) :].isfinite().all().item(), "what is void must be finite"
        return out[: len(q)].cpu(), cache


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("path", ["whole", "one_by_one", "mixed"])
@pytest.mark.parametrize("name", SPECS)
def test_values_are_those_of_the_reference(
    name: str, path: str, padded: bool, device: Hardware
) -> None:
    spec = make_spec(**SPECS[name])
    work = Sequences(spec, make_need(spec), LENGTHS)
    want = work.run(ReferenceAttention(CPU), work.whole())
    got = work.run(OnDevice(BUCKETS if padded else None), getattr(work, path)())
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("path", ["whole", "one_by_one"])
def test_a_row_that_is_not_finite_spoils_no_other(path: str, device: Hardware) -> None:
    spec = make_spec()
    work = Sequences(spec, make_need(spec), LENGTHS)
    steps = getattr(work, path)()
    want = work.run(OnDevice(BUCKETS), steps)
    work.v[2].fill_(float("nan"))
    got = work.run(OnDevice(BUCKETS), steps)
    assert got[2].isnan().all()
    for i in (0, 1, 3, 4):
        assert torch.equal(got[i], want[i])


def test_shapes_follow_from_the_padded_step_alone(device: Hardware) -> None:
    spec = make_spec(window=20)
    need = make_need(spec)
    work = Sequences(spec, need, LENGTHS)

    def shapes(pieces: list[tuple[int, int, int]]) -> list[torch.Size]:
        plan = OnDevice(BUCKETS).plan(work.batch(pieces), need)
        return [part.shape for part in vars(plan).values()]

    assert shapes([(4, 0, 100)]) == shapes([(4, 30, 64), (3, 0, 17), (1, 0, 5), (0, 0, 1)])
    assert shapes([(4, 99, 1)]) == shapes([(4, 80, 1), (1, 2, 1)])


def test_a_plan_reaches_the_device_in_one_copy(device: Hardware) -> None:
    spec = make_spec()
    work = Sequences(spec, make_need(spec), LENGTHS)
    before = device.counters.to_device.copies
    OnDevice(BUCKETS).plan(work.batch(work.whole()[0]), work.need)
    assert device.counters.to_device.copies == before + 1


def test_blocks_are_copied_and_cost_what_is_said(device: Hardware) -> None:
    spec = make_spec()
    need, backend = make_need(spec), SimAttention(torch.device(SIM))
    before = device.memory[0].used
    cache = backend.allocate(spec, need, 5)
    assert device.memory[0].used - before == 5 * backend.bytes_per_block(spec, need)
    cache.keys_BKEP[3] = 1.0
    backend.copy_blocks([cache], np.array([[3, 1], [0, 0]], np.int32))
    assert cache.keys_BKEP[1].min().item() == 1
    assert not cache.keys_BKEP[2].any().item()


@pytest.mark.parametrize(
    ("spec", "need", "reason"),
    [
        ({"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)}, {}, "ALiBi"),
        ({}, {"kv_dtype": "int8"}, "not int8"),
        ({}, {"block_size": 8}, "not 8"),
        ({}, {"deterministic": True}, "as many keys"),
    ],
)
def test_what_it_cannot_do_it_refuses_with_a_reason(
    spec: dict[str, Any], need: dict[str, Any], reason: str
) -> None:
    assert reason in str(SimAttention(CPU).refuses(make_need(make_spec(**spec), **need)))
    assert SimAttention(CPU).refuses(make_need(make_spec(soft_cap=1.0))) is None
