"""Logits processors that are installed, and the objects made of them: one of each per process."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

from dovetail.core.contracts.logits import LogitsProcessor
from dovetail.core.errors import PluginError, RequestError
from dovetail.core.plugins.entries import AllowList
from dovetail.core.plugins.registry import Registry, describe_error, subclass_of

__all__ = ["GROUP", "LogitsProcessors"]

GROUP = "dovetail.logits_processors"

_DEPTH = 32


class LogitsProcessors:
    """Finds processors by name. Reads what is installed, and imports one, when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, LogitsProcessor] = {}

    @cached_property
    def _registry(self) -> Registry[type[LogitsProcessor]]:
        return Registry(
            GROUP,
            "logits processor",
            subclass_of(LogitsProcessor),
            allowed=AllowList.from_environ(os.environ),
        )

    def get(self, name: str) -> LogitsProcessor:
        """The processor of that name.

        Raises:
            SelectionError: There is none; the message lists those that there are.
            PluginError: It cannot be imported or made, or two packages offer it.
        """
        if name not in self._made:
            kind = self._registry.load(name)
            try:
                self._made[name] = kind()
            except Exception as error:
                entry = self._registry.entry(name)
                what = f"cannot be made: {describe_error(error)}"
                raise self._registry.error(entry, what) from error
        return self._made[name]

    def check(self, wanted: dict[str, Any], vocab_size: int) -> None:
        """Refuse a request that names what is not there, or gives an argument that is wrong.

        Raises:
            RequestError: Lists what is installed, or says what the processor says.
            PluginError: The processor is broken.
        """
        for name, argument in wanted.items():
            if name not in self._registry.names():
                message = self._registry.unknown(name)
                raise RequestError(message, param="logits_processors")
            if not _is_plain(argument, _DEPTH):
                raise RequestError(
                    f"The argument of the logits processor {name!r} must be plain data: text,"
                    " numbers of 64 bits, true, false, null, and lists and objects of these, not"
                    f" nested deeper than {_DEPTH} levels.",
                    param=f"logits_processors.{name}",
                )
            try:
                self.get(name).validate(argument, vocab_size)
            except (PluginError, RequestError):
                raise
            except Exception as error:
                what = str(error) if isinstance(error, ValueError) else describe_error(error)
                raise RequestError(
                    f"The logits processor {name!r} refuses its argument: {what}",
                    param=f"logits_processors.{name}",
                ) from error


def _is_plain(value: Any, depth: int) -> bool:
    """Whether a message to the engine process can hold it."""
    match value:
        case bool() | None | str() | float():
            return True
        case int():
            return -(1 << 63) <= value < 1 << 64
        case list():
            return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
        case dict():
            return depth > 0 and all(
                isinstance(key, str) and _is_plain(item, depth - 1) for key, item in value.items()
            )
    return False
