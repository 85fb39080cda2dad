"""One engine process as its parent sees it: start it, talk to it, know when it has ended."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Mapping
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from dovetail.core.config.schema import EngineConfig
from dovetail.core.engine.messages import (
    FromEngine,
    Start,
    ToEngine,
    addresses,
    decode_from_engine,
    encode,
)
from dovetail.core.engine.numbering import Numbered, Numbers

__all__ = ["EngineChild"]


class EngineChild:
    """A started engine process and its two sockets, in a folder that only this user can enter."""

    def __init__(self, process: Process, context: zmq.asyncio.Context, folder: Path) -> None:
        self._process = process
        self._context = context
        self._folder = folder
        self._numbers = Numbers()
        self._numbered = Numbered()
        self._inbox = context.socket(zmq.PULL)
        self._outbox = context.socket(zmq.PUSH)
        for socket in (self._inbox, self._outbox):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
        self._outbox.bind(addresses(folder)[0])
        self._inbox.bind(addresses(folder)[1])

    @classmethod
    async def start(
        cls, config: EngineConfig, platform: str, environment: Mapping[str, str]
    ) -> EngineChild:
        """Start the process; it begins to load at once, and logs as this one to standard error.

        Args:
            config: The user's wishes.
            platform: The selected platform.
            environment: Variables that the platform needs.
        """
        folder = Path(tempfile.mkdtemp(prefix="dovetail-"))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "dovetail.core.engine.process",
            str(folder),
            str(os.getpid()),
            env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **environment, **os.environ},
            stdin=asyncio.subprocess.DEVNULL,
            # A terminal's Ctrl-C is for the front end, from the first moment on.
            start_new_session=True,
        )
        child = cls(process, zmq.asyncio.Context(), folder)
        log_level = logging.getLevelName(logging.getLogger().getEffectiveLevel())
        start = Start(config=config, platform=platform, log_level=log_level)
        child._give(msgspec.msgpack.encode(start))
        return child

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queue a message; never waits for the process.

        What is sent to one that has ended is lost: whoever takes its place is told again.
        """
        self._give(self._numbers.wrap(encode(message)))

    def _give(self, data: bytes) -> None:
        # The socket keeps what it cannot send yet, in order, and drops it when it is closed. Nobody
        # may wait for that: a process that has ended, or that never connects, would hold him up.
        if not self._outbox.closed:
            self._outbox.send(data)

    async def receive(self) -> FromEngine:
        """The next message.

        Raises:
            InvariantError: One was lost.
            msgspec.DecodeError: It cannot be read.
        """
        data = None
        while data is None:
            data = self._numbered.unwrap(await self._inbox.recv())
        return decode_from_engine(data)

    async def wait(self) -> int:
        """Wait for the end of the process; its exit status, negative for a signal."""
        return await self._process.wait()

    async def end(self, patience: float) -> None:
        """Wait up to ``patience`` seconds for the process to end by itself, then kill it."""
        if self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), patience)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._inbox.close(0)
        self._outbox.close(0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)
