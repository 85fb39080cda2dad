"""The engine process: ``python -m dovetail.core.engine.process FOLDER PARENT``.

Takes a :class:`Start` and then requests from one socket in the folder, sends what happens to the
other. It ends when it is told to, when its parent is gone, or with a failure that it reports first.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
import zmq

from dovetail.core.engine.build import BuiltEngine, build_engine
from dovetail.core.engine.collector import settle
from dovetail.core.engine.core import EngineCore
from dovetail.core.engine.debug import describe_scheduler
from dovetail.core.engine.messages import (
    Abort,
    AddRequest,
    Control,
    Failed,
    FromEngine,
    Heartbeat,
    Loading,
    Outputs,
    Ready,
    Start,
    State,
    addresses,
    decode_to_engine,
    encode,
)
from dovetail.core.engine.numbering import Numbered, Numbers, unnumbered
from dovetail.core.errors import DovetailError
from dovetail.core.faults import arm, fault, message_faults

__all__ = ["EXIT_FAILED", "main"]

EXIT_FAILED = 3
"""Exit status after a failure that was reported."""
_HEARTBEAT_S = 0.5
_STATS_S = 0.05
_QUIET_MS = 1000
_SWEEP_S = 60.0
"""After a quiet second the engine looks at its whole state, but no oftener than this."""

_log = logging.getLogger(__name__)


class _Channel:
    """The sockets of the process. The heartbeat thread has a socket of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._context = zmq.Context()
        self.inbox = self._context.socket(zmq.PULL)
        self.inbox.connect(addresses(folder)[0])
        self._outbox = self.open_outbox()
        self._numbers = Numbers()
        self._numbered = Numbered()

    def open_outbox(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.connect(addresses(self.folder)[1])
        return socket

    def send(self, message: FromEngine) -> None:
        for frame in message_faults("engine.outbox", self._numbers.wrap(encode(message))):
            self._outbox.send(frame)

    def receive(self) -> list[bytes]:
        """What comes with the next frame: one message, unless it came before.

        Raises:
            InvariantError: A message was lost.
        """
        frames = message_faults("engine.inbox", self.inbox.recv())
        messages = (self._numbered.unwrap(frame) for frame in frames)
        return [message for message in messages if message is not None]

    def close(self) -> None:
        self.inbox.close(0)
        self._outbox.close()
        self._context.term()


class _Heart(threading.Thread):
    """Beats while the process lives, and ends it when the parent is gone."""

    def __init__(self, channel: _Channel, parent: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._channel = channel
        self._parent = parent
        self._stopped = threading.Event()
        self.core: EngineCore | None = None

    def run(self) -> None:
        outbox = self._channel.open_outbox()
        while not self._stopped.wait(_HEARTBEAT_S):
            if os.getppid() != self._parent:
                shutil.rmtree(self._channel.folder, ignore_errors=True)
                os._exit(1)
            core = self.core
            steps = core.scheduler.stats.num_steps if core else 0
            beat = Heartbeat(num_steps=steps, has_work=bool(core and core.has_work()))
            outbox.send(unnumbered(encode(beat)))
        outbox.close()

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def main(arguments: list[str]) -> int:
    """Run until told to end; returns the exit status."""
    # A service manager signals every process: when to end is for the server to say.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = _Channel(Path(arguments[0]))
    heart = _Heart(channel, parent=int(arguments[1]))
    heart.start()
    start = msgspec.msgpack.decode(channel.inbox.recv(), type=Start)
    logging.basicConfig(level=start.log_level, format="%(levelname)s %(name)s: %(message)s")
    try:
        _serve(channel, heart, start)
    except Exception as error:
        if not isinstance(error, DovetailError):
            _log.exception("the engine failed")
        text = (
            str(error) if isinstance(error, DovetailError) else f"{type(error).__name__}: {error}"
        )
        channel.send(Failed(kind=type(error).__name__, message=text))
        return EXIT_FAILED
    finally:
        heart.stop()
        channel.close()
    return 0


def _serve(channel: _Channel, heart: _Heart, start: Start) -> None:
    def progress(name: str, done: int, total: int) -> None:
        channel.send(Loading(name=name, done=done, total=total))

    arm()
    built = build_engine(start.config, start.platform, progress)
    heart.core = built.core
    channel.send(_ready(built))
    settle()
    try:
        _loop(channel, built.core)
    finally:
        built.core.close()


def _ready(built: BuiltEngine) -> Ready:
    return Ready(
        max_model_len=built.config.max_model_len,
        num_blocks=built.num_blocks,
        block_size=built.config.block_size,
        banner=built.banner,
        max_num_seqs=built.config.max_num_seqs,
        features=sorted(built.features),
    )


def _loop(channel: _Channel, core: EngineCore) -> None:
    """Take what has come, do a step, say what it gave. Sleeps while there is nothing to do."""
    last_sent = last_sweep = 0.0
    while True:
        fault("engine.loop")
        if not core.has_work():
            channel.send(Outputs(updates=[], stats=core.stats()))
            if time.monotonic() - last_sweep > _SWEEP_S and not channel.inbox.poll(_QUIET_MS):
                core.sweep()
                last_sweep = time.monotonic()
            channel.inbox.poll()
        while channel.inbox.poll(0):
            for data in channel.receive():
                if not _take(channel, core, data):
                    return
        if core.has_work():
            updates, now = core.step(), time.monotonic()
            if updates or now - last_sent > _STATS_S:
                channel.send(Outputs(updates=updates, stats=core.stats()))
                last_sent = now


def _take(channel: _Channel, core: EngineCore, data: bytes) -> bool:
    """Act on one message; False: the process is to end.

    A message that cannot be read is dropped: the front end is another version, or the line is bad.
    """
    try:
        message = decode_to_engine(data)
    except msgspec.DecodeError as error:
        _log.error("a message of %d bytes cannot be read: %s", len(data), error)
        return True
    match message:
        case AddRequest(request=request):
            core.add(request)
        case Abort(ids=ids):
            core.abort(ids)
        case Control(name="reset_prefix_cache"):
            core.scheduler.pool.forget_cached()
        case Control(name="dump"):
            channel.send(State(state=describe_scheduler(core.scheduler)))
        case Control(name="shutdown"):
            return False
        case Control(name=name):
            _log.warning("unknown command %r", name)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
