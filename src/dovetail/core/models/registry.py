"""Which architectures have a native model: the entry-point group ``dovetail.models``."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dovetail.core.contracts.model import Model
from dovetail.core.plugins.entries import AllowList
from dovetail.core.plugins.registry import Registry, subclass_of

__all__ = ["GROUP", "find_model", "native_architectures"]

GROUP = "dovetail.models"
"""The entry point's name is the architecture as ``config.json`` spells it, its value the class."""


def native_architectures() -> list[str]:
    """Every architecture that some installed distribution offers, sorted. Imports none of them."""
    return list(_registry().names())


def find_model(architectures: Sequence[str]) -> type[Model] | None:
    """The class of the first architecture that is offered; None if none is.

    Args:
        architectures: ``architectures`` of the checkpoint's ``config.json``.

    Raises:
        PluginError: Two distributions offer it, it cannot be imported, or it is not a Model.
    """
    registry = _registry()
    offered = [name for name in architectures if name in registry.names()]
    return registry.load(offered[0]) if offered else None


def _registry() -> Registry[type[Model]]:
    allowed = AllowList.from_environ(os.environ)
    return Registry(GROUP, "model", subclass_of(Model), allowed=allowed)
