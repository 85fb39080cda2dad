"""What one field of the configuration says about itself; flags and docs are made from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Option", "option", "options_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A field as the user sees it."""

    name: str = ""
    default: Any = None
    help: str
    """What it does, with its unit."""
    group: str
    """Heading under which ``--help`` shows it."""
    parse: Callable[[Any], Any]
    """Gives the normal form of a value, or raises ValueError that says what is allowed."""
    choices: tuple[str, ...] = ()
    """All allowed words, if they are few."""
    synonyms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other words for some of the values."""
    aliases: tuple[str, ...] = ()
    """Other names of the field."""
    metavar: str | None = None
    is_switch: bool = False
    """It is true or false."""
    repeats: bool = False
    """It takes several values."""

    def normalise(self, value: Any) -> Any:
        """The value in its normal form. Raises ValueError that says what is allowed."""
        value = self.parse(value)
        if isinstance(value, str):
            value = self.synonyms.get(value, value)
        if self.choices and value is not None and value not in self.choices:
            raise ValueError(f"one of {', '.join(self.choices)}")
        return value


def option(default: Any, *, parse: Callable[[Any], Any], group: str, help: str, **more: Any) -> Any:
    """A dataclass field that carries an :class:`Option`. ``more`` is further fields of it."""
    entry = Option(parse=parse, group=group, help=help, default=default, **more)
    return dataclasses.field(default=default, metadata={"option": entry})


def options_of(config: type[Any]) -> dict[str, Option]:
    """The options of a configuration class, by field name, in order of definition."""
    return {
        f.name: dataclasses.replace(
            f.metadata["option"],
            name=f.name,
            is_switch=str(f.type).startswith("bool"),
            repeats=str(f.type).startswith("tuple"),
        )
        for f in dataclasses.fields(config)
        if "option" in f.metadata
    }
