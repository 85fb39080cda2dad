"""The admin socket: the engine's state for those who may read the file, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dovetail.core.engine.api import EngineClient
from dovetail.core.server.listen import bind
from dovetail.core.server.settings import Limits
from dovetail.core.server.wire import wire_protocol

__all__ = ["admin_socket", "create_admin_app"]

_PRIVATE = 0o177
"""Mask that leaves the owner's reading and writing."""


def create_admin_app(client: EngineClient) -> Starlette:
    """``GET /debug/state``: all that the engine keeps, but not what clients say or are told."""

    async def state(http: Request) -> Response:
        return JSONResponse(await client.debug_state())

    return Starlette(routes=[Route("/debug/state", state)])


@contextlib.asynccontextmanager
async def admin_socket(client: EngineClient, path: str | None) -> AsyncIterator[None]:
    """Answer on a Unix socket with mode 0600 for as long as this is entered; None: do nothing.

    Raises:
        ServerError: The path cannot be had.
    """
    if path is None:
        yield
        return
    listener = _bind_private(path)
    server = _Quiet(_config(create_admin_app(client)))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        await task
        listener.close()
        Path(path).unlink(missing_ok=True)


def _bind_private(path: str) -> socket.socket:
    """The file has its mode from the first moment on."""
    mask = os.umask(_PRIVATE)
    try:
        return bind(None, 0, uds=path)
    finally:
        os.umask(mask)


def _config(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=wire_protocol(Limits()),
        loop="none",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )


class _Quiet(uvicorn.Server):
    """Leaves signals to the server proper."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
