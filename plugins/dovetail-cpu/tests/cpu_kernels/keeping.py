"""Layers that are kept, for tests."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from dovetail_cpu.kept import KeptPanels
from dovetail_cpu.kernels import Kernels
from dovetail_cpu.linear import PanelLinear
from dovetail_cpu.memory import HugePages

from dovetail.core.contracts.model import Linear

LEAF = Linear(sources=("w",), out_features=(70,), in_features=96)


def written() -> None:
    """Wait for whoever is writing."""
    for thread in threading.enumerate():
        if thread.name == "packed weights":
            thread.join(60)
            assert not thread.is_alive()


def files(folder: Path) -> list[Path]:
    written()
    return sorted(folder.iterdir()) if folder.exists() else []


def linear(kernels: Kernels, memory: HugePages, seed: int = 0) -> PanelLinear:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(70, 96, generator=random).bfloat16()
    return PanelLinear(kernels, memory, weight, torch.randn(70, generator=random).bfloat16())


def keep(file: Path, kernels: Kernels, layers: dict[str, Any], leaf: Linear = LEAF) -> KeptPanels:
    """A start that finds nothing, or nothing that is right."""
    store = KeptPanels(file, kernels, HugePages())
    for path, layer in layers.items():
        assert store.find(path, leaf) is None
        store.keep(path, leaf, layer)
    store.finish()
    written()
    return store
