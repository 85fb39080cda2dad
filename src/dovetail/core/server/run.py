"""Runs the server: the socket first, then the engine, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from dovetail.core.engine.api import EngineClient
from dovetail.core.errors import EngineDeadError, OverloadedError
from dovetail.core.server.admin import admin_socket
from dovetail.core.server.admission import Admission
from dovetail.core.server.app import create_app
from dovetail.core.server.listen import BACKLOG, bind, url_of
from dovetail.core.server.settings import ServerError, ServerSettings
from dovetail.core.server.wire import wire_protocol

__all__ = ["EXIT_CUT_OFF", "EXIT_DRAINED", "EXIT_ENGINE_DEAD", "serve"]

EXIT_DRAINED = 0
"""Every request that had begun was answered."""
EXIT_ENGINE_DEAD = 70
"""The engine ended by itself; a supervisor should start the server again."""
EXIT_CUT_OFF = 75
"""Stopped as asked, but some requests had to be ended."""

_POLL_S = 0.05
_LOG_EVERY_S = 5.0
_FLUSH_S = 0.5
"""Time for last words to leave, after requests were ended."""
_CLOSE_S = 10.0
"""Time for the engine to end."""

_log = logging.getLogger("dovetail.server")


async def serve(
    client: EngineClient,
    settings: ServerSettings | None = None,
    host: str | None = "127.0.0.1",
    port: int = 8000,
    *,
    uds: str | None = None,
    listener: socket.socket | None = None,
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
    ssl_keyfile_password: str | None = None,
    ssl_ca_certs: str | None = None,
    shutdown_timeout: float = 30.0,
    admin_path: str | None = None,
    on_listening: Callable[[str], None] | None = None,
) -> int:
    """Serve ``client`` until SIGTERM or SIGINT, or until the engine dies; then close it.

    The server answers at once, with 503 and the engine's progress while it loads. Asked to stop,
    it takes no new requests and finishes those that run; asked again, it ends them.

    Args:
        client: The engine; may still be loading.
        settings: How to present it.
        host: Name or address to listen on; None for all interfaces.
        port: TCP port; 0 takes any free one.
        uds: Path of a Unix socket, in place of host and port.
        listener: A socket from ``bind``, in place of all three.
        ssl_certfile: Certificate chain; with it the server speaks HTTPS.
        ssl_keyfile: The certificate's key, if it is not in the same file.
        ssl_keyfile_password: What the key is encrypted with.
        ssl_ca_certs: Authorities, one of which must have signed the client's certificate.
        shutdown_timeout: Seconds for running requests, once asked to stop.
        admin_path: Path of a Unix socket for ``/debug/state``; None: there is none.
        on_listening: Called with the URL when connections are answered.

    Returns:
        An exit code: ``EXIT_DRAINED``, ``EXIT_CUT_OFF`` or ``EXIT_ENGINE_DEAD``.

    Raises:
        ServerError: The address is taken, or a certificate cannot be read.
    """
    settings = settings or ServerSettings()
    app = create_app(client, settings)
    tls = {
        "ssl_certfile": ssl_certfile,
        "ssl_keyfile": ssl_keyfile,
        "ssl_keyfile_password": ssl_keyfile_password,
        "ssl_ca_certs": ssl_ca_certs,
    }
    config = _loaded_config(app, settings, tls)
    with contextlib.closing(listener or bind(host, port, uds=uds)) as sock:
        url = url_of(sock, tls=config.is_ssl)
        run = _Run(client, app.state.context.admission, config, shutdown_timeout)
        async with admin_socket(client, admin_path):
            return await run.until_stopped(
                sock, lambda: on_listening(url) if on_listening else None
            )


def _loaded_config(
    app: Starlette, settings: ServerSettings, tls: dict[str, str | None]
) -> uvicorn.Config:
    """What uvicorn is told: our protocol, the loop that runs, nothing of its own."""
    config = uvicorn.Config(
        app,
        http=wire_protocol(settings.limits),
        loop="none",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        root_path=settings.root_path,
        backlog=BACKLOG,
        timeout_keep_alive=settings.limits.idle_connection_s,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls["ssl_ca_certs"] else ssl.CERT_NONE,
        **tls,  # type: ignore[arg-type]
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as exc:
        raise ServerError(f"The certificate or its key cannot be used: {exc}.") from None
    return config


class _Signals:
    """Counts the requests to stop: the first asks, the second insists."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()

    def ask(self) -> None:
        (self.insisted if self.asked.is_set() else self.asked).set()

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT, where that is possible."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self.ask)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to ``_Signals``."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Run:
    """One server from its first connection to its exit code."""

    def __init__(
        self, client: EngineClient, admission: Admission, config: uvicorn.Config, timeout: float
    ) -> None:
        self._client = client
        self._admission = admission
        self._server = _Uvicorn(config)
        self._timeout = timeout
        self._signals = _Signals()
        self._clock = asyncio.get_running_loop().time

    async def until_stopped(self, sock: socket.socket, listening: Callable[[], None]) -> int:
        with self._signals.caught():
            http = asyncio.create_task(self._server.serve(sockets=[sock]))
            try:
                while not self._server.started and not http.done():
                    await asyncio.sleep(0)
                if http.done():
                    await http
                listening()
                while not (self._is_dead() or self._signals.asked.is_set() or http.done()):
                    await self._pause(self._signals.asked)
                return await self._end()
            except BaseException:
                self._server.force_exit = True
                raise
            finally:
                self._server.should_exit = True
                await http
                await self._close_client()

    def _is_dead(self) -> bool:
        return self._client.status.state == "dead"

    async def _pause(self, event: asyncio.Event) -> None:
        """A short wait, or less if ``event`` comes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                await event.wait()

    async def _end(self) -> int:
        """Let what runs finish, end what does not, and say how it went."""
        deadline = self._clock() + self._timeout
        if not self._is_dead():
            await self._drain(deadline)
        is_dead = self._is_dead()
        if is_dead:
            reason = self._client.status.reason
            _log.critical(
                "The engine is dead: %s. The server stops.",
                (reason or "no reason given").rstrip("."),
            )
            error: Exception = EngineDeadError(reason)
        else:
            error = OverloadedError("The server shut down and ended this request.", status=503)
        num_ended = self._admission.abort_all(error)
        if num_ended:
            _log.warning("Ended %d running requests.", num_ended)
        if num_ended or is_dead:
            await asyncio.sleep(_FLUSH_S)
        self._server.force_exit = self._signals.insisted.is_set()
        left = max(deadline - self._clock(), _FLUSH_S)
        self._server.config.timeout_graceful_shutdown = round(left + 0.5)
        if is_dead:
            return EXIT_ENGINE_DEAD
        return EXIT_CUT_OFF if num_ended else EXIT_DRAINED

    async def _drain(self, deadline: float) -> None:
        """Refuse new requests and wait for the running ones."""
        self._admission.draining = True
        is_loading = self._client.status.state == "loading"
        drain = None if is_loading else asyncio.create_task(self._client.drain(self._timeout))
        log_at = self._clock()
        while not self._signals.insisted.is_set() and self._clock() < deadline:
            if self._is_dead() or not (len(self._admission) or (drain and not drain.done())):
                break
            if self._clock() >= log_at:
                left = deadline - self._clock()
                _log.info("Stopping: %d requests run, %.0f s left.", len(self._admission), left)
                log_at += _LOG_EVERY_S
            await self._pause(self._signals.insisted)
        if drain is not None:
            await _settle(drain)

    async def _close_client(self) -> None:
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._client.close()
        except TimeoutError:
            _log.error("The engine did not end within %g seconds.", _CLOSE_S)


async def _settle(task: asyncio.Task[None]) -> None:
    """End ``task``; its own failure is logged, since there is nothing left to do about it."""
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(outcome, Exception):
        _log.error("Draining the engine failed: %s", outcome)
