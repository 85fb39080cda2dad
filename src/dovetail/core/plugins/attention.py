"""Which attention backends there are, and the choice of one: pure, and it keeps every reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dovetail.core.contracts.attention import AttentionBackend, AttentionNeed
from dovetail.core.errors import SelectionError
from dovetail.core.plugins.entries import AllowList
from dovetail.core.plugins.registry import Registry

__all__ = [
    "ATTENTION_GROUP",
    "AttentionChoice",
    "attention_group",
    "attention_registry",
    "choose_attention",
    "installed_backends",
    "refuse_backend",
]

ATTENTION_GROUP = "dovetail.attention_backends"

_METHODS = ("refuses", "bytes_per_block", "allocate", "plan", "attend", "copy_blocks")


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """The backend, and what was said of every candidate."""

    backend: AttentionBackend
    reasons: Mapping[str, str]
    """By name, in order of preference: why it was chosen, refused or not needed."""

    def describe(self) -> str:
        """One line for the start-up message."""
        name = self.backend.name
        refused = [f"{other}: {why}" for other, why in self.reasons.items() if other != name]
        return f"{name} ({self.reasons[name]})" + "".join(f"; {line}" for line in refused)


def attention_group(family: str) -> str:
    """The entry-point group of the backends for a family of arrays (``Capabilities.family``).

    Families have groups of their own, so that looking for one imports no other's framework.
    """
    return ATTENTION_GROUP if family == "torch" else f"{ATTENTION_GROUP}.{family}"


def attention_registry(
    family: str, environ: Mapping[str, str] = os.environ
) -> Registry[Callable[[object], AttentionBackend]]:
    """Backends of a family that are installed and that ``DOVETAIL_PLUGINS`` admits."""
    allowed = AllowList.from_environ(environ)
    return Registry(attention_group(family), "attention backend", refuse_backend, allowed=allowed)


def refuse_backend(found: object) -> str | None:
    """Why a loaded object is no attention backend, if it is not."""
    missing = [name for name in _METHODS if not callable(getattr(found, name, None))]
    return f"is no attention backend: it lacks {', '.join(missing)}" if missing else None


def installed_backends(
    family: str, device: object, order: Sequence[str] = ()
) -> list[AttentionBackend]:
    """Every installed backend of a family, made for a device.

    Args:
        family: Of the arrays.
        device: What the platform's backends are made with.
        order: Names, preferred first; those that it lacks come after, by name.

    Raises:
        PluginError: One cannot be imported or is no backend.
    """
    registry = attention_registry(family)
    known = registry.names()
    chosen = [name for name in order if name in known]
    names = [*chosen, *(name for name in known if name not in chosen)]
    return [registry.load(name)(device) for name in names]


def choose_attention(
    candidates: Sequence[AttentionBackend], need: AttentionNeed, *, insisted: str | None
) -> AttentionChoice:
    """The first candidate that does not refuse, or the one that the user insists on.

    Args:
        candidates: In the platform's order of preference.
        need: What the model asks for.
        insisted: ``--attention-backend`` or ``DOVETAIL_ATTENTION_BACKEND``.

    Raises:
        SelectionError: The insisted backend is unknown or refuses, or all refuse; every reason
            is in the message.
    """
    reasons: dict[str, str] = {}
    by_name = {backend.name: backend for backend in candidates}
    if insisted is not None:
        if insisted not in by_name:
            known = ", ".join(by_name)
            raise SelectionError(
                f"There is no attention backend {insisted!r} here; known: {known}."
            )
        why = by_name[insisted].refuses(need)
        if why is not None:
            raise SelectionError(f"The attention backend {insisted!r} cannot serve this: {why}.")
        return AttentionChoice(backend=by_name[insisted], reasons={insisted: "named by the user"})
    for backend in candidates:
        why = backend.refuses(need)
        if why is None:
            reasons[backend.name] = "first in the platform's order that serves the model"
            return AttentionChoice(backend=backend, reasons=reasons)
        reasons[backend.name] = why
    lines = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    raise SelectionError(f"No attention backend serves this model: {lines}.")
