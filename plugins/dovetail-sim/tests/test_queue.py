"""Steps that a queue works off: what they cost in copies, and that nobody waits between them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dovetail_sim.device import Hardware
from dovetail_sim.platform import SimPlatform
from torch import Tensor

from dovetail.core.engine.core import EngineCore
from dovetail.core.request import Request, SamplingParams
from dovetail.platforms.torch.queue import Mark
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core
from tests.platforms.torch.recordable import StagedPlatform, make_staged

SMALL: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 160}
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(3, 250) for _ in range(length)] for length in (1, 17, 40, 90, 3)]


class SimQueue:
    """Copies to the host arrive when a mark is waited for, and show poison before."""

    def __init__(self, device: Hardware) -> None:
        self.waits = 0
        self._device = device

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def mark(self) -> Mark:
        return self

    def wait(self) -> None:
        self.waits += 1
        self._device.synchronize()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()

        def replay() -> None:
            before = self._crossed()
            work()
            assert self._crossed() == before, "what is recorded may not wait for the host"

        replay()
        return replay

    def _crossed(self) -> tuple[int, int, int]:
        counters = self._device.counters
        return counters.to_device.copies, counters.to_host.copies, self.waits


class Rig:
    def __init__(self, model: Path, device: Hardware, **settings: Any) -> None:
        self.device = device
        self.queue = SimQueue(device)
        platform = StagedPlatform(SimPlatform(), self.queue)
        self.core = make_staged(
            model, platform, **(SMALL | {"gpu_memory_utilization": 0.5} | settings)
        )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("ahead", [True, False])
def test_tokens_are_those_of_the_host(ahead: bool, llama: Path, device: Hardware) -> None:
    rig = Rig(llama, device, async_scheduling=ahead)
    for params in (
        SamplingParams(temperature=0.0, max_tokens=16),
        SamplingParams(temperature=0.9, top_p=0.9, max_tokens=12),
        SamplingParams(temperature=0.0, logprobs=2, repetition_penalty=1.2, max_tokens=10),
    ):
        got = answer(rig.core, PROMPTS, params)
        want = answer(make_core(llama, "cpu", **SMALL), PROMPTS, params)
        assert [a.token_ids for a in got] == [a.token_ids for a in want]
        for a, b in zip(got, want, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("count", [1, 5])
def test_a_decode_step_is_two_copies_and_one_wait(
    count: int, llama: Path, device: Hardware
) -> None:
    rig = Rig(llama, device)
    start(rig.core, count)
    traffic = device.counters
    seen = []
    while rig.core.has_work():
        before = (traffic.to_device.copies, traffic.to_host.copies, rig.queue.waits)
        updates = rig.core.step()
        after = (traffic.to_device.copies, traffic.to_host.copies, rig.queue.waits)
        if len(updates) == count and rig.core.has_work():
            seen.append(tuple(b - a for a, b in zip(before, after, strict=True)))
    assert len(seen) > 8
    assert set(seen[1:-2]) == {(1, 1, 1)}


def test_the_next_step_is_given_before_the_last_is_waited_for(
    llama: Path, device: Hardware
) -> None:
    rig = Rig(llama, device)
    start(rig.core, 3)
    events: list[str] = []
    send, wait = rig.core.runner.step, rig.queue.wait

    def step(batch: Any) -> Any:
        waits = rig.queue.waits
        pending = send(batch)
        assert rig.queue.waits == waits, "starting a step waited for the device"
        events.append("step")
        return pending

    def waited() -> None:
        wait()
        events.append("wait")

    rig.core.runner.step = step  # type: ignore[method-assign]
    rig.queue.wait = waited  # type: ignore[method-assign]
    while rig.core.has_work():
        rig.core.step()
    assert events[:3] == ["step", "step", "wait"]
    assert events.count("step") == events.count("wait")
    outstanding = [
        events[: i + 1].count("step") - events[: i + 1].count("wait") for i in range(len(events))
    ]
    assert max(outstanding) == 2 and outstanding.count(2) > 8


def start(core: EngineCore, count: int) -> None:
    for number in range(count):
        core.add(
            Request(
                id=number,
                prompt_token_ids=PROMPTS[1],
                params=SamplingParams(temperature=0.0, max_tokens=16),
                stop_token_ids=[],
                seed=0,
                arrival_time=float(number),
            )
        )
