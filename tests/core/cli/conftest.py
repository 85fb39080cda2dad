import sys
import types

import pytest

from .fakes import FakeEngine


@pytest.fixture
def engine(monkeypatch):
    """The engine that commands start, in place of a real one."""
    made = FakeEngine()

    class AsyncEngine:
        @staticmethod
        async def start(config):
            made.config = config
            return made

    module = types.ModuleType("dovetail.core.engine.async_engine")
    module.AsyncEngine = AsyncEngine
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return made
