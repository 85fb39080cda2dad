"""Platforms for the kit to look at: the reference, whole or with one part replaced."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from dovetail.core.conformance.catalogue import catalogue
from dovetail.core.conformance.gaps import KnownGaps
from dovetail.core.conformance.outcome import Outcome, outcome_of
from dovetail.core.conformance.shelf import Shelf
from dovetail.core.conformance.subject import Subject
from dovetail.core.contracts.platform import Platform
from dovetail.core.plugins.selection import load_platform, platform_registry

__all__ = ["Wrapped", "broken", "capable", "look"]


def broken(**members: Any) -> Platform:
    """The reference platform with these members of its class replaced."""
    base = type(load_platform("reference"))
    return type("Broken", (base,), members)()  # type: ignore[no-any-return]


def capable(**changes: Any) -> Any:
    """The reference platform's capabilities, changed."""
    return replace(load_platform("reference").capabilities, **changes)


def look(platform: Platform, shelf: Shelf, name: str) -> Outcome:
    """What comes of one check."""
    entry = platform_registry(os.environ).entry("reference")
    subject = Subject(entry, shelf, platform=platform)
    try:
        (check,) = [check for check in catalogue(subject) if check.name == name]
        return outcome_of(subject, check, KnownGaps())
    finally:
        subject.close()


class Wrapped:
    """An object with some of its methods replaced: each is given the object's own one first."""

    def __init__(self, inner: Any, **methods: Any) -> None:
        self._inner = inner
        self._methods = methods

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._inner, name)
        if name not in self._methods:
            return own
        return lambda *arguments: self._methods[name](own, *arguments)
