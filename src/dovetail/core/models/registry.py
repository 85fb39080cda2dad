"""Which architectures have a native model: the entry-point group ``dovetail.models``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from dovetail.core.contracts.model import Model
from dovetail.core.errors import PluginError

__all__ = ["GROUP", "find_model", "native_architectures"]

GROUP = "dovetail.models"
"""The entry point's name is the architecture as ``config.json`` spells it, its value the class."""


def native_architectures() -> list[str]:
    """Every architecture that some installed distribution offers, sorted. Imports none of them."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def find_model(architectures: Sequence[str]) -> type[Model] | None:
    """The class of the first architecture that is offered; None if none is.

    Args:
        architectures: ``architectures`` of the checkpoint's ``config.json``.

    Raises:
        PluginError: Two distributions offer it, it cannot be imported, or it is not a Model.
    """
    for architecture in architectures:
        offers = tuple(entry_points(group=GROUP, name=architecture))
        if offers:
            return _load(architecture, offers)
    return None


def _load(architecture: str, offers: Sequence[EntryPoint]) -> type[Model]:
    if len(offers) > 1:
        origins = ", ".join(f"{entry.value} of {_origin(entry)}" for entry in offers)
        raise PluginError(f"{architecture} is offered more than once: {origins}. Uninstall one.")
    (entry,) = offers
    try:
        found = entry.load()
    except Exception as error:
        raise PluginError(
            f"{_origin(entry)} offers the model {architecture}, but {entry.value} could not be "
            f"imported: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Model)):
        raise PluginError(
            f"{_origin(entry)} offers {entry.value} as the model {architecture}, but it is "
            f"{found!r:.80}; it must be a subclass of dovetail.core.contracts.model.Model."
        )
    return found


def _origin(entry: EntryPoint) -> str:
    if entry.dist is None:
        return "an unknown distribution"
    return f"{entry.dist.name} {entry.dist.version}"
