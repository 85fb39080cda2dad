"""Whole engines whose steps are recorded and replayed over the emulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dovetail_rocm.aiter import AiterAttention

from tests.attention_backends.engines import PagedEngine


@pytest.mark.usefixtures("emulated")
class TestAiter(PagedEngine):
    def make(self, device: torch.device) -> Any:
        return AiterAttention(device, "gfx942", "7.1.25424")
