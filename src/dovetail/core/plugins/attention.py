"""Which attention backends there are, and the choice of one: pure, and it keeps every reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeAlias, cast

from dovetail.core.contracts.attention import AttentionBackend, AttentionNeed
from dovetail.core.errors import PluginError, SelectionError
from dovetail.core.plugins.entries import AllowList
from dovetail.core.plugins.registry import LoadError, Registry, describe_error, import_entry

__all__ = [
    "ATTENTION_GROUP",
    "AttentionChoice",
    "BrokenBackend",
    "attention_group",
    "attention_registry",
    "choose_attention",
    "installed_backends",
    "refuse_backend",
]

ATTENTION_GROUP = "dovetail.attention_backends"

Kind: TypeAlias = Callable[[object], AttentionBackend]
"""What an entry point names: given the device, it makes the backend."""

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


class BrokenBackend:
    """Stands for a backend that cannot be loaded: refuses every need, and says why."""

    def __init__(self, name: str, why: str) -> None:
        self.name = name
        self._why = why

    def refuses(self, need: AttentionNeed) -> str:
        """Why it cannot be loaded."""
        return self._why

    def _fail(self, *arguments: object) -> NoReturn:
        raise PluginError(f"{self._why}.")

    bytes_per_block = allocate = plan = attend = copy_blocks = _fail


def attention_group(family: str) -> str:
    """The entry-point group of the backends for a family of arrays (``Capabilities.family``).

    Families have groups of their own, so that looking for one imports no other's framework.
    """
    return ATTENTION_GROUP if family == "torch" else f"{ATTENTION_GROUP}.{family}"


def attention_registry(family: str, environ: Mapping[str, str] = os.environ) -> Registry[Kind]:
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

    One that cannot be imported, made or told from another of its name is a
    :class:`BrokenBackend`, so that it harms nobody who does not ask for it.

    Args:
        family: Of the arrays.
        device: What the platform's backends are made with.
        order: Names, preferred first; those that it lacks come after, by name.
    """
    registry = attention_registry(family)
    known = registry.names()
    chosen = [name for name in order if name in known]
    names = [*chosen, *(name for name in known if name not in chosen)]
    return [_make(registry, name, device) for name in names]


def _make(registry: Registry[Kind], name: str, device: object) -> AttentionBackend:
    try:
        entry = registry.entry(name)
    except PluginError as error:
        return BrokenBackend(name, str(error).rstrip("."))
    try:
        backend = cast(Kind, import_entry(entry, refuse_backend))(device)
    except LoadError as error:
        what = str(error)
    except (Exception, SystemExit) as error:
        what = f"cannot be made: {describe_error(error)}"
    else:
        called = getattr(backend, "name", None)
        if called == name:
            return backend
        what = f"calls itself {called!r:.80}"
    return BrokenBackend(name, f"it {what} ({entry.origin}, {entry.value})")


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
    by_name = {backend.name: backend for backend in candidates}
    refusals = {name: _refusal(backend, need) for name, backend in by_name.items()}
    chosen, why = insisted, "named by the user"
    if insisted is None:
        chosen = next((name for name, refusal in refusals.items() if refusal is None), None)
        why = "first in the platform's order that serves the model"
    elif insisted not in by_name:
        known = ", ".join(by_name)
        raise SelectionError(f"There is no attention backend {insisted!r} here; known: {known}.")
    elif refusals[insisted] is not None:
        reason = refusals[insisted]
        raise SelectionError(f"The attention backend {insisted!r} cannot serve this: {reason}.")
    if chosen is None:
        lines = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
        raise SelectionError(f"No attention backend serves this model: {lines}.")
    reasons = {name: refusal or "not needed" for name, refusal in refusals.items()}
    return AttentionChoice(backend=by_name[chosen], reasons={**reasons, chosen: why})


def _refusal(backend: AttentionBackend, need: AttentionNeed) -> str | None:
    """What the backend says; one that fails to say anything refuses."""
    try:
        why: object = backend.refuses(need)
    except Exception as error:
        return f"asking it failed: {describe_error(error)}"
    if why is None or isinstance(why, str):
        return why
    return f"it answered {why!r:.80}, which is neither a reason nor None"
