"""The choice of an attention backend: a pure function that keeps every reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dovetail.core.contracts.attention import AttentionBackend, AttentionNeed
from dovetail.core.errors import SelectionError

__all__ = ["AttentionChoice", "choose_attention"]


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
