"""The choice of an attention backend: a pure function that keeps every reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dovetail.core.contracts.attention import AttentionBackend, AttentionNeed
from dovetail.core.errors import SelectionError
from dovetail.core.plugins.registry import describe_error

__all__ = ["ATTENTION_GROUP", "AttentionChoice", "choose_attention", "refuse_attention_backend"]

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


def refuse_attention_backend(found: object) -> str | None:
    """Why a loaded class, or object, is no attention backend, if it is none."""
    missing = [name for name in _METHODS if not callable(getattr(found, name, None))]
    return f"is no attention backend: it lacks {', '.join(missing)}" if missing else None


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
    if insisted is not None:
        if insisted not in by_name:
            known = ", ".join(by_name)
            raise SelectionError(
                f"There is no attention backend {insisted!r} here; known: {known}."
            )
        why = _refusal(by_name[insisted], need)
        if why is not None:
            raise SelectionError(f"The attention backend {insisted!r} cannot serve this: {why}.")
        return AttentionChoice(backend=by_name[insisted], reasons={insisted: "named by the user"})
    refusals = {name: _refusal(backend, need) for name, backend in by_name.items()}
    able = [name for name, why in refusals.items() if why is None]
    if not able:
        lines = "; ".join(f"{name}: {why}" for name, why in refusals.items())
        raise SelectionError(f"No attention backend serves this model: {lines}.")
    reasons = {name: why or f"not needed, {able[0]} comes first" for name, why in refusals.items()}
    reasons[able[0]] = "first in the platform's order that serves the model"
    return AttentionChoice(backend=by_name[able[0]], reasons=reasons)


def _refusal(backend: AttentionBackend, need: AttentionNeed) -> str | None:
    """What the backend says; a backend that fails to say anything refuses."""
    try:
        why: object = backend.refuses(need)
    except Exception as error:
        return f"asking it failed: {describe_error(error)}"
    if why is None or isinstance(why, str):
        return why
    return f"it answered {why!r:.80}, which is neither a reason nor None"
