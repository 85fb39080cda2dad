"""Starting an engine while the user watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from dovetail.core.cli.console import Progress, note
from dovetail.core.config.schema import EngineConfig

if TYPE_CHECKING:
    from dovetail.core.engine.async_engine import AsyncEngine

__all__ = ["bundled_model", "running_engine", "show_loading"]

_POLL_SECONDS = 0.1


@asynccontextmanager
async def running_engine(config: EngineConfig) -> AsyncIterator[AsyncEngine]:
    """An engine that is ready; it ends with the context. Progress goes to stderr.

    Raises:
        DovetailError: It cannot start, for the reason given.
    """
    from dovetail.core.engine.async_engine import AsyncEngine

    if config.model is None:
        note(bundled_model())
    engine = await AsyncEngine.start(config)
    try:
        await show_loading(engine)
        yield engine
    finally:
        await engine.close()


async def show_loading(engine: AsyncEngine) -> None:
    """Show how far the engine is until it is ready. Raises what kept it from it."""
    progress = Progress()
    ready = asyncio.ensure_future(engine.wait_ready())
    try:
        while not ready.done():
            if engine.status.state == "loading":
                progress.show(engine.status.reason)
            await asyncio.wait([ready], timeout=_POLL_SECONDS)
    finally:
        ready.cancel()
        progress.clear()
    await ready


def bundled_model() -> str:
    """What is used where no model is named."""
    from dovetail.core.demo import DEMO_MODEL_DESCRIPTION, DEMO_MODEL_NAME

    return f"No --model: using the bundled {DEMO_MODEL_NAME}, {DEMO_MODEL_DESCRIPTION}."
