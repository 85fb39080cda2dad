"""The files that take longest come first, so that no worker is left with one of them at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

LONGEST = (
    "system/test_native_models.py",
    "core/plugins/test_hostile.py",
    "platforms/torch/test_deterministic.py",
    "core/simulate/test_simulate.py",
    "system/test_server_under_load.py",
    "core/cli/test_doctor.py",
    "core/cli/test_new_plugin.py",
    "vendor/test_acme.py",
    "core/conformance/test_pytest_front.py",
    "core/kv/test_pool_machine.py",
    "test_wheel.py",
)
_PLACES = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _PLACES.get(item.path, len(_PLACES)))
