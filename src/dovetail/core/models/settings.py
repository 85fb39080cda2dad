"""Checked reading of a checkpoint's ``config.json``: every error names the key and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from dovetail.core.errors import CheckpointError, UnsupportedError

__all__ = ["Settings"]

T = TypeVar("T")


class Settings:
    """A mapping of settings. A key whose value is null counts as absent, but for ``optional_*``.

    Args:
        values: The settings, as parsed from JSON.
        owner: Who reads them, for messages: ``LlamaForCausalLM``.
    """

    def __init__(self, values: Mapping[str, Any], owner: str) -> None:
        self.values = values
        self.owner = owner

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer of at least ``minimum``. Raises CheckpointError, also if absent."""
        value = self._get(key, default, f"an integer of at least {minimum}")
        if type(value) is not int or value < minimum:
            raise self._wrong(key, value, f"an integer of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0. Raises CheckpointError, also if absent and without default."""
        value = self._get(key, default, "a number above 0")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def optional_integer(self, key: str, absent: int | None = None) -> int | None:
        """As ``integer``; None if the key is null, ``absent`` if it is not there."""
        return self.integer(key) if self.has(key) else self._none(key, absent)

    def optional_number(self, key: str, absent: float | None = None) -> float | None:
        """As ``number``; None if the key is null, ``absent`` if it is not there."""
        return self.number(key) if self.has(key) else self._none(key, absent)

    def flag(self, key: str, default: bool) -> bool:
        """True or false. Raises CheckpointError for anything else."""
        value = self._get(key, default, "true or false")
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of ``length`` numbers. Raises CheckpointError for anything else."""
        wanted = f"a list of {length} numbers"
        value = self._get(key, None, wanted)
        if not isinstance(value, list) or len(value) != length:
            raise self._wrong(key, value, wanted)
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
            raise self._wrong(key, value, wanted)
        return tuple(float(v) for v in value)

    def strings(self, key: str, length: int, allowed: tuple[str, ...]) -> tuple[str, ...]:
        """A list of ``length`` strings. Raises UnsupportedError for one that is not allowed."""
        wanted = f"a list of {length} strings"
        value = self._get(key, None, wanted)
        if not isinstance(value, list) or len(value) != length:
            raise self._wrong(key, value, wanted)
        for item in value:
            if item not in allowed:
                raise self._unsupported(key, item, allowed)
        return tuple(value)

    def choice(self, key: str, allowed: Mapping[str, T], default: str | None = None) -> T:
        """What ``allowed`` holds for the value. Raises UnsupportedError for another value."""
        value = self._get(key, default, "one of " + ", ".join(allowed))
        if not isinstance(value, str) or value not in allowed:
            raise self._unsupported(key, value, tuple(allowed))
        return allowed[value]

    def require(self, key: str, only: object) -> None:
        """Raise UnsupportedError if the key is there with another value than ``only``."""
        value = self.values.get(key)
        if value is not None and value != only:
            raise self._unsupported(key, value, (str(only),))

    def _none(self, key: str, absent: T) -> T | None:
        return None if key in self.values else absent

    def _get(self, key: str, default: object, wanted: str) -> object:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(
                f"config.json lacks {key!r}, which {self.owner} needs ({wanted}); "
                "add it, or download the checkpoint again."
            )
        return value

    def _wrong(self, key: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"config.json has {key!r} = {value!r:.80}, but {self.owner} needs {wanted}."
        )

    def _unsupported(self, key: str, value: object, allowed: tuple[str, ...]) -> UnsupportedError:
        return UnsupportedError(
            f"{self.owner} with {key} = {value!r:.80} is not supported by the native model; "
            f"supported: {', '.join(allowed)}. `--model-impl transformers` may run it."
        )
