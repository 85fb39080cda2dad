"""The OpenAI-compatible HTTP server over one engine."""

from dovetail.core.server.app import create_app
from dovetail.core.server.listen import bind
from dovetail.core.server.run import (
    EXIT_CUT_OFF,
    EXIT_DRAINED,
    EXIT_ENGINE_DEAD,
    new_event_loop,
    serve,
)
from dovetail.core.server.settings import Limits, ServerError, ServerSettings

__all__ = [
    "EXIT_CUT_OFF",
    "EXIT_DRAINED",
    "EXIT_ENGINE_DEAD",
    "Limits",
    "ServerError",
    "ServerSettings",
    "bind",
    "create_app",
    "new_event_loop",
    "serve",
]
