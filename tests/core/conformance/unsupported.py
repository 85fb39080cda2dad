"""What the kit may skip on our own platforms, as a plug-in of pytest: ``make test-reference``.

A check says itself that a platform does not support it, and is skipped. One that ran before and is
skipped from now on would go unseen: here it fails.
"""

from __future__ import annotations

from collections.abc import Generator
from fnmatch import fnmatchcase
from typing import Any

import pytest

_ALL = (
    "attention.sdpa.alibi.*",
    "attention.triton.*",
    "attention.*.padding.*",
    "features.tensor_parallel",
    "engine.shapes",
    "engine.memory_returned",
)
UNSUPPORTED = {
    "reference": (*_ALL, "attention.*.deterministic.*", "features.deterministic"),
    "cpu": (
        *_ALL,
        *(f"attention.{name}.deterministic.*" for name in ("native", "sdpa", "reference")),
        *(f"attention.native.*.{dtype}" for dtype in ("float32", "float16")),
        *(f"attention.native.head_{size}.*" for size in (20, 33)),
        *(f"attention.native.kv_{kind}*" for kind in ("float", "fp8", "int8")),
    ),
}
"""Names of checks by platform, as ``fnmatch`` has them."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    platform, check = parameters.get("platform"), parameters.get("check")
    if check is None or platform not in UNSUPPORTED or hasattr(report, "wasxfail"):
        return report
    expected = any(fnmatchcase(check.name, pattern) for pattern in UNSUPPORTED[platform])
    if report.outcome == "skipped" and not expected:
        report.outcome = "failed"
        report.longrepr = f"{check.name} ran before, and is unsupported on {platform} now"
    return report
