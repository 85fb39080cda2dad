"""The simulated accelerator under the whole engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dovetail_sim.device import Hardware

from dovetail.core.batch import Batch, StepOutput
from dovetail.core.contracts.runner import Pending
from dovetail.core.engine.core import EngineCore
from dovetail.core.errors import OutOfMemoryError
from dovetail.core.request import Request, SamplingParams
from dovetail.core.update import Update
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core
from tests.thorough import every

SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 160}
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(3, 250) for _ in range(length)] for length in (1, 17, 40, 90, 3)]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "max_tokens": 24}
GREEDY = SamplingParams(temperature=0.0, max_tokens=32)


def make_sim(model: Path, **settings: Any) -> EngineCore:
    return make_core(model, "sim", **(SMALL | {"gpu_memory_utilization": 0.5} | settings))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def tokens(core: EngineCore, params: SamplingParams = GREEDY, **more: Any) -> list[list[int]]:
    return [each.token_ids for each in answer(core, PROMPTS, params, **more)]


@pytest.mark.parametrize("family", every(2, ["mistral", "gemma2", "opt"]))
def test_tokens_are_those_of_the_reference(family: str, tmp_path: Path, device: Hardware) -> None:
    more = {"sliding_window": 32} if family == "mistral" else {}
    model = make_checkpoint(family, tmp_path, **more)
    core = make_sim(model)
    known = set(device.counters.signatures)
    got = tokens(core)
    assert device.counters.signatures <= known, "a shape that the warm-up did not meet"
    assert got == tokens(make_core(model, "reference", **SMALL))
    assert all(len(each) == 32 for each in got)


PATHS: dict[str, dict[str, Any]] = {
    "preemption": {"num_gpu_blocks_override": 14},
    "one step ahead": {"async_scheduling": True},
    "one at a time": {"max_num_seqs": 1},
    "drafts": {
        "speculative_config": {
            "method": "suffix",
            "num_speculative_tokens": 3,
            "adaptive": False,
        }
    },
}


@pytest.mark.parametrize("path", PATHS)
def test_no_path_needs_a_shape_of_its_own(path: str, llama: Path, device: Hardware) -> None:
    core = make_sim(llama, **PATHS[path])
    known = set(device.counters.signatures)
    cold, warm = tokens(core), tokens(core, first_id=100)
    assert device.counters.signatures <= known
    assert cold == warm == tokens(make_core(llama, "reference", **SMALL))
    if path == "preemption":
        assert core.scheduler.stats.num_preemptions > 0
    if path == "drafts":
        assert core.stats().num_accepted_tokens > 0


def test_sampled_tokens_are_those_of_the_host(llama: Path, device: Hardware) -> None:
    core, host = make_sim(llama), make_core(llama, "cpu", **SMALL)
    known = set(device.counters.signatures)
    for more in (
        {"top_p": 0.95},
        {"top_k": 5, "min_p": 0.05, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.3, "logit_bias": {7: 3.0}, "min_tokens": 8},
    ):
        params = SamplingParams(**SAMPLED, **more)
        got = tokens(core, params, seeds=[5, 6, 7, 8, 9])
        assert got == tokens(host, params, seeds=[5, 6, 7, 8, 9])
    assert device.counters.signatures <= known


def test_log_probabilities_of_prompts_are_those_of_the_host(llama: Path, device: Hardware) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=3, logprobs=2)
    core = make_sim(llama)
    known = set(device.counters.signatures)
    got = answer(core, PROMPTS, params)
    want = answer(make_core(llama, "reference", **SMALL), PROMPTS, params)
    assert device.counters.signatures <= known
    assert values(got) == pytest.approx(values(want), abs=1e-4)
    assert len(values(got)) > sum(map(len, PROMPTS))


def values(answers: list[Any]) -> list[float]:
    """Every log-probability that was told, in order."""
    told = [
        entry
        for each in answers
        for update in each.updates
        for entry in (*(update.prompt_logprobs or ()), *(update.logprobs or ()))
    ]
    return [value for entry in told if entry is not None for value in entry.logprobs]


def test_a_decode_step_copies_as_often_for_one_row_as_for_eight(
    llama: Path, device: Hardware
) -> None:
    core = make_sim(llama, max_num_seqs=8)
    for count in (1, 8):
        assert set(decode_copies(core, device, count)) == {(4, 1)}


def decode_copies(core: EngineCore, device: Hardware, count: int) -> Iterator[tuple[int, int]]:
    """Copies to the device and to the host of each step in which all rows decode."""
    for i in range(count):
        core.add(request(1000 * count + i, PROMPTS[1]))
    while core.has_work():
        traffic = (device.counters.to_device, device.counters.to_host)
        before = [each.copies for each in traffic]
        updates = core.step()
        if len(updates) == count and all(len(update.token_ids) == 1 for update in updates):
            after = [each.copies for each in traffic]
            yield after[0] - before[0], after[1] - before[1]


def request(number: int, prompt: list[int], max_tokens: int = 8) -> Request:
    return Request(
        id=number,
        prompt_token_ids=prompt,
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        stop_token_ids=[],
        seed=0,
        arrival_time=float(number),
    )


def run(core: EngineCore) -> dict[int, list[Update]]:
    """To the end; every update by request."""
    told: dict[int, list[Update]] = {}
    while core.has_work():
        for update in core.step():
            told.setdefault(update.id, []).append(update)
    core.scheduler.pool.check([])
    return told


@pytest.mark.parametrize("kind", ["op", "memory"])
def test_a_failure_ends_the_request_that_meets_it_alone(
    kind: str, llama: Path, device: Hardware
) -> None:
    core = make_sim(llama)
    core.add(request(1, PROMPTS[1]))
    core.add(request(2, PROMPTS[2]))
    while not core.step():
        pass
    # The step of both fails, and the first of the two again when it runs alone.
    fail = device.faults.fail_op if kind == "op" else device.faults.fail_allocation
    fail(1, times=2)
    told = run(core)
    ends = {number: updates[-1] for number, updates in told.items()}
    assert sorted(end.finish_reason or "" for end in ends.values()) == ["error", "length"]
    error = next(end.error for end in ends.values() if end.error)
    expected = "does not fit in the device's memory" if kind == "memory" else "RuntimeError"
    assert expected in error
    core.add(request(3, PROMPTS[2]))
    after = [token for update in run(core)[3] for token in update.token_ids]
    assert after == tokens(make_core(llama, "reference", **SMALL))[2][:8]


def test_a_model_that_does_not_fit_says_so(llama: Path, device: Hardware) -> None:
    device.faults.fail_allocation(3)
    with pytest.raises(OutOfMemoryError, match="weights do not fit in the device's memory"):
        make_sim(llama)


def test_an_op_that_is_missing_fails_the_start(llama: Path, device: Hardware) -> None:
    device.faults.unsupported = {"aten.silu"}
    with pytest.raises(NotImplementedError, match=r"aten\.silu"):
        make_sim(llama)


class Hasty:
    """A runner that does not wait for what its device copies: wrong, on purpose."""

    def __init__(self, pending: Pending) -> None:
        self._pending = pending

    def result(self) -> StepOutput:
        output = self._pending.result()
        there = torch.from_numpy(output.token_ids.copy()).to("sim:0")
        late = torch.empty(there.shape, dtype=there.dtype)
        late.copy_(there, non_blocking=True)
        return replace(output, token_ids=late.numpy())


def test_a_missing_synchronisation_is_seen(
    llama: Path, device: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_sim(llama)
    right = tokens(core)
    step = core.runner.step

    def hasty(batch: Batch) -> Pending:
        return Hasty(step(batch))

    monkeypatch.setattr(core.runner, "step", hasty)
    core.add(request(1, PROMPTS[1]))
    first = next(updates for updates in iter(core.step, None) if updates)[0]
    assert first.token_ids != right[1][:1]
