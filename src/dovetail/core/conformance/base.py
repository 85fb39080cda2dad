"""What a check is, and how it says what it found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dovetail.core.errors import UnsupportedError

if TYPE_CHECKING:
    from dovetail.core.conformance.subject import Subject

__all__ = ["LEVELS", "Check", "CheckFailedError", "expect", "expect_equal", "require"]

LEVELS = {
    1: "the contract: nothing is computed",
    2: "ops, attention and collectives, one by one",
    3: "whole models through the engine",
}
"""What each level looks at. A level includes those before it."""


class CheckFailedError(Exception):
    """The platform does not keep the contract. The message says what was wanted and seen."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that a platform has to do.

    ``function`` returns if the platform does it, raises UnsupportedError with a reason if the
    platform says that it does not offer it, and CheckFailedError, or anything else, if it fails.
    """

    name: str
    """Dotted, such as ``ops.rms_norm.float32``."""
    level: int
    """Of ``LEVELS``."""
    statement: str
    """What is true of a platform that passes, in one line."""
    function: Callable[[Subject], None]


def expect(condition: bool, message: str) -> None:
    """Raise CheckFailedError unless the condition holds."""
    if not condition:
        raise CheckFailedError(message)


def expect_equal(what: str, got: object, want: object) -> None:
    """Raise CheckFailedError unless two values are equal."""
    expect(got == want, f"{what}: wanted {want!r:.200}, got {got!r:.200}")


def require(condition: bool, reason: str) -> None:
    """Raise UnsupportedError unless the platform offers what is to be checked."""
    if not condition:
        raise UnsupportedError(reason)
