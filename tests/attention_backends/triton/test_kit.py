"""The conformance kit's attention checks, over the reference platform with this backend alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dovetail.attention_backends.triton.backend import TritonAttention
from dovetail.core.conformance.attention_checks import CASES, checks
from dovetail.core.conformance.gaps import KnownGaps
from dovetail.core.conformance.outcome import outcome_of
from dovetail.core.conformance.shelf import Shelf
from dovetail.core.conformance.subject import Subject
from dovetail.core.plugins.selection import load_platform, platform_registry

FULL = os.environ.get("DOVETAIL_ATTENTION_KIT") == "full"
SHORT = ("one_kv_head", "narrow_window", "head_33", "head_96", "block_1", "kv_int8")
"""What tests beside this one do not look at in the same way."""
NAMES = [
    *(f"{name}.float16" for name in (CASES if FULL else SHORT)),
    *(f"{name}.float32" for name in (CASES if FULL else ())),
    *(f"{name}.float32" for name in ("copy_blocks", "cache_bytes")),
]


@pytest.fixture(scope="module")
def subject(device: torch.device) -> Iterator[Subject]:
    base = type(load_platform("reference"))

    def backends(platform: Any) -> list[TritonAttention]:
        return [TritonAttention(device)]

    made = type("WithTriton", (base,), {"attention_backends": backends, "device": device})
    shelf = Shelf()
    found = Subject(platform_registry(os.environ).entry("reference"), shelf, platform=made())
    yield found
    found.close()
    shelf.close()


@pytest.mark.parametrize("name", NAMES)
def test_attention(name: str, subject: Subject) -> None:
    (check,) = [c for c in checks(subject) if c.name == f"attention.triton.{name}"]
    outcome = outcome_of(subject, check, KnownGaps())
    assert outcome.status == "pass", outcome.reason
