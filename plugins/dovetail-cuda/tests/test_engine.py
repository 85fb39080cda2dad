"""Whole engines whose steps are recorded and replayed over the emulations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dovetail_cuda.flash import FlashAttention2, FlashAttention3
from dovetail_cuda.flashinfer import FlashInferAttention, _Planner

from tests.attention_backends.engines import PagedEngine

pytestmark = pytest.mark.usefixtures("emulated")

HOPPER = (9, 0)


class TestFlashAttention3(PagedEngine):
    def make(self, device: torch.device) -> Any:
        return FlashAttention3(device, HOPPER)


class TestFlashAttention2(PagedEngine):
    block_size = 256

    def make(self, device: torch.device) -> Any:
        return FlashAttention2(device, HOPPER)


class TestFlashInfer(PagedEngine):
    def make(self, device: torch.device) -> Any:
        return FlashInferAttention(device, HOPPER)


def test_a_plan_waits_until_the_one_before_is_copied() -> None:
    done: list[str] = []

    class Event:
        def synchronize(self) -> None:
            done.append("wait")

        def record(self) -> None:
            done.append("mark")

    class Wrapper:
        def plan(self, *arrays: Any, **arguments: Any) -> None:
            done.append("plan")

    event: Any = Event()
    planner = _Planner(Wrapper(), event)
    planner.plan()
    planner.plan()
    assert done == ["wait", "plan", "mark"] * 2
