"""The public API is complete, sorted and documented, and cheap to import."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

import dovetail

MAX_IMPORT_SECONDS = 0.3

MEASURE = """
import json, sys, time
started = time.process_time()
import dovetail
seconds = time.process_time() - started
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""


def faults(module: ModuleType | SimpleNamespace) -> list[str]:
    """What is wrong with a module's public names."""
    names = list(getattr(module, "__all__", []))
    found = [] if names else ["there is no __all__"]
    if names != sorted(set(names)):
        found.append("__all__ is not sorted, or names something twice")
    for name in names:
        if not hasattr(module, name):
            found.append(f"{name} does not exist")
        elif callable(getattr(module, name)) and not own_doc(getattr(module, name)):
            found.append(f"{name} has no docstring")
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in names and is_ours(value):
            found.append(f"{name} is public and not in __all__")
    return found


def own_doc(value: object) -> str | None:
    return value.__dict__.get("__doc__") if isinstance(value, type) else inspect.getdoc(value)


def is_ours(value: object) -> bool:
    """Whether a value was defined here; what is imported from elsewhere is no public name."""
    return str(getattr(value, "__module__", "")).partition(".")[0] in ("dovetail", "tests")


def test_every_public_name_is_listed_and_documented() -> None:
    assert faults(dovetail) == []


def documented() -> None:
    """Is documented."""


def undocumented() -> None: ...


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        ({}, "there is no __all__"),
        ({"__all__": ["b", "a"], "a": 1, "b": 1}, "not sorted"),
        ({"__all__": ["a"]}, "a does not exist"),
        ({"__all__": ["f"], "f": undocumented}, "f has no docstring"),
        ({"__all__": ["f"], "f": documented, "g": documented}, "g is public"),
    ],
)
def test_a_fault_is_found(names: dict[str, object], fault: str) -> None:
    assert any(fault in found for found in faults(SimpleNamespace(**names)))


def test_a_module_without_faults() -> None:
    names = {"__all__": ["f"], "f": documented, "_g": undocumented, "sys": sys}
    assert faults(SimpleNamespace(**names)) == []


def test_importing_is_quick_and_loads_no_framework() -> None:
    runs = [
        json.loads(subprocess.check_output([sys.executable, "-c", MEASURE], text=True))
        for _ in range(3)
    ]
    loaded = {"torch", "jax", "transformers", "dovetail.core.server"} & set(runs[0]["modules"])
    assert loaded == set()
    assert min(run["seconds"] for run in runs) < MAX_IMPORT_SECONDS
