from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest

from dovetail.core.server.listen import new_event_loop

ON_EVERY_LOOP = {"test_wire", "test_disconnect", "test_run"}
"""Tests of what depends on the loop's transports and signals."""


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    factories = {"default": new_event_loop}
    if item.path.stem in ON_EVERY_LOOP:
        factories["asyncio"] = asyncio.new_event_loop
    return factories
