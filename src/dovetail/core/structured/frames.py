"""What the front end and its examining process say to each other."""

from __future__ import annotations

import struct
from typing import IO

import msgspec

__all__ = ["Verdict", "read_frame", "write_frame"]

_LENGTH = struct.Struct("<Q")


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What was found out about a constraint."""

    grammar: str = ""
    """In llguidance's form, if it can be followed."""
    reason: str = ""
    """Why it cannot, else."""


def write_frame(pipe: IO[bytes], message: msgspec.Struct) -> None:
    """Send one message: its length in 8 bytes, then msgpack."""
    data = msgspec.msgpack.encode(message)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> bytes | None:
    """The next message, or None at the end of the pipe."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = pipe.read(length)
    return data if len(data) == length else None
