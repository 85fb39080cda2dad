"""Takes the address that the server listens on, and says plainly why if it cannot be had.

Of the server only this is there before the engine process is started: it imports little.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import stat
from pathlib import Path

from dovetail.core.server.settings import ServerError

__all__ = ["bind", "new_event_loop", "url_of"]

BACKLOG = 2048
ALL_INTERFACES = "0.0.0.0"


def new_event_loop() -> asyncio.AbstractEventLoop:
    """The loop to run ``serve`` on: uvloop's where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def bind(host: str | None, port: int, *, uds: str | None = None) -> socket.socket:
    """Take the address, before anything slow begins.

    Args:
        host: Name or address; None for all interfaces.
        port: TCP port; 0 takes any free one.
        uds: Path of a Unix socket, in place of host and port.

    Raises:
        ServerError: The address cannot be had; one line says why and what to do.
    """
    if uds is not None:
        return _bind_unix(uds)
    if not 0 <= port <= 65535:
        raise ServerError(f"--port must be from 0 to 65535, not {port}.")
    try:
        found = socket.getaddrinfo(
            host or ALL_INTERFACES, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError):
        message = f"The host {host!r} is not known; use --host 127.0.0.1 or --host 0.0.0.0."
        raise ServerError(message) from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        raise ServerError(_why_not(host or ALL_INTERFACES, port, exc)) from None
    listener.setblocking(False)
    return listener


def _why_not(host: str, port: int, exc: OSError) -> str:
    number = exc.errno
    if number == errno.EADDRINUSE:
        return (
            f"Port {port} on {host} is in use by another program: stop that one"
            f" (`ss -ltnp 'sport = :{port}'` shows it), or choose another with --port."
        )
    if number == errno.EACCES:
        return f"Port {port} needs privileges; choose one above 1023 with --port."
    if number == errno.EADDRNOTAVAIL:
        return f"This machine has no address {host}; use --host 127.0.0.1 or --host 0.0.0.0."
    return f"Cannot listen on {host} port {port}: {exc.strerror}."


def _bind_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        raise ServerError(f"Cannot listen on the Unix socket {path}: {exc.strerror}.") from None
    listener.setblocking(False)
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on any more."""
    if not Path(path).exists() or not stat.S_ISSOCK(Path(path).stat().st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()


def url_of(listener: socket.socket, *, tls: bool = False) -> str:
    """What a client on this machine types to reach ``listener``."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    host, port = name[0], name[1]
    if listener.family == socket.AF_INET6:
        host = f"[{host}]"
    return f"{'https' if tls else 'http'}://{host}:{port}"
