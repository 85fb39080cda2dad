"""What the front end and the engine process say to each other, in msgpack.

Plain data only, arrays instead of maps, no pickle: a message can be read by any version of
either side that knows the same fields, and reading one runs no code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from dovetail.core.config.schema import EngineConfig
from dovetail.core.engine.api import EngineStats
from dovetail.core.request import Request
from dovetail.core.update import Update

__all__ = [
    "Abort",
    "AddRequest",
    "Control",
    "Failed",
    "FromEngine",
    "Heartbeat",
    "Loading",
    "Outputs",
    "Ready",
    "Start",
    "State",
    "ToEngine",
    "Update",
    "addresses",
    "decode_from_engine",
    "decode_to_engine",
    "encode",
]


def addresses(folder: Path) -> tuple[str, str]:
    """The addresses of the two sockets in a folder: to the engine, and from it."""
    return f"ipc://{folder}/in", f"ipc://{folder}/out"


class Start(msgspec.Struct, kw_only=True):
    """The first message: everything the process needs to know."""

    config: EngineConfig
    platform: str
    log_level: str = "INFO"


class AddRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Start one sequence."""

    request: Request


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Give these sequences up. Unknown ids are those that ended meanwhile: no error."""

    ids: list[int]


class Control(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Anything rare, by name: ``drain``, ``shutdown``, ``dump``, ``reset_prefix_cache``, ..."""

    name: str
    argument: Any = None
    """Plain data: what msgpack can hold."""


class Outputs(msgspec.Struct, array_like=True, tag=True):
    """The outcome of one step."""

    updates: list[Update]
    stats: EngineStats


class Loading(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """How far the engine's start has come."""

    name: str
    """What is being done, such as ``weights``."""
    done: int
    total: int
    """In the same unit as ``done``; 0 if it is not known."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine takes requests."""

    max_model_len: int
    """Tokens."""
    num_blocks: int
    block_size: int
    """Tokens per block."""
    banner: dict[str, str]
    """Facts to show to the user, in this order."""
    max_num_seqs: int
    """Sequences that run at a time."""
    features: list[str]
    """Of the platform: ``Capabilities.features``."""


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine cannot start, or cannot go on. It ends after this."""

    kind: str
    """The name of an error class of ``dovetail.core.errors``."""
    message: str


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine process lives. Sent at a fixed interval, also while a step runs."""

    num_steps: int
    """Steps since the start: if this stays the same while there is work, the device hangs."""
    has_work: bool


class State(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The answer to the command ``dump``: see ``engine.debug``."""

    state: dict[str, Any]


ToEngine: TypeAlias = AddRequest | Abort | Control
FromEngine: TypeAlias = Outputs | Loading | Ready | Failed | Heartbeat | State

_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """One message as msgpack."""
    return _ENCODER.encode(message)


def decode_to_engine(data: bytes | memoryview) -> ToEngine:
    """Read what the front end sent.

    Raises:
        msgspec.DecodeError: Not msgpack, not one of these messages, or a value out of range.
    """
    return _TO_ENGINE.decode(data)


def decode_from_engine(data: bytes | memoryview) -> FromEngine:
    """Read what the engine sent.

    Raises:
        msgspec.DecodeError: Not msgpack, or not one of these messages.
    """
    return _FROM_ENGINE.decode(data)
