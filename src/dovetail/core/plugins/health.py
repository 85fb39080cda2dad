"""Whether what is installed can be imported and is of the right kind; platforms aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dovetail.core.errors import DovetailError
from dovetail.core.plugins.attention import ATTENTION_GROUP, refuse_backend
from dovetail.core.plugins.children import Errand, Outcome
from dovetail.core.plugins.entries import AllowList, Entry
from dovetail.core.plugins.examine import PLATFORM_GROUP
from dovetail.core.plugins.registry import (
    LoadError,
    clash,
    describe_error,
    import_entry,
    nearest,
    subclass_of,
)

__all__ = ["GROUPS", "EntryReport", "import_errands", "import_report", "import_reports", "kind_of"]

GROUPS: dict[str, str] = {
    PLATFORM_GROUP: "platform",
    ATTENTION_GROUP: "attention backend",
    "dovetail.quant": "quantization scheme",
    "dovetail.models": "model",
    "dovetail.hooks": "listener",
    "dovetail.logits_processors": "logits processor",
}
"""Every entry-point group, with what it holds."""

State: TypeAlias = Literal["fine", "broken", "claimed twice", "kept out", "not reached"]

_MAX_REASON = 300


@dataclass(frozen=True, kw_only=True)
class EntryReport:
    """What is known about one entry of a group."""

    group: str
    name: str
    value: str
    distribution: str
    version: str
    state: State
    """``kept out``: ``DOVETAIL_PLUGINS`` does not name it, and nothing of it was imported;
    ``not reached``: what was examined before it took too long, or ended the process."""
    reason: str = ""
    """What is wrong, in one line."""

    @property
    def origin(self) -> str:
        """Package and version: ``dovetail-cpu 0.1.0``."""
        return f"{self.distribution} {self.version}"


def kind_of(group: str) -> str:
    """The group, or the one that it is a part of: families of arrays have their own backends."""
    return ATTENTION_GROUP if group.startswith(f"{ATTENTION_GROUP}.") else group


def import_errands(
    entries: Iterable[Entry], environ: Mapping[str, str], *, deadline: float, remedy: str
) -> tuple[Errand, ...]:
    """The child processes that import what may be imported: one for Dovetail's own entries
    together, and one for each other entry. None for platforms, which are probed."""
    chosen = [entry for entry in entries if kind_of(entry.group) in _CHECKS]
    allowed = AllowList.from_environ(environ)
    admitted = [entry for entry in chosen if allowed.admits(entry)]
    single = [entry for entry in admitted if len(_rivals(entry, chosen, allowed)) == 1]
    own = tuple(entry for entry in single if entry.builtin)
    shares = [own] if own else []
    shares += [(entry,) for entry in single if not entry.builtin]
    return tuple(
        Errand(question="import", entries=share, deadline=deadline, remedy=remedy)
        for share in shares
    )


def import_reports(
    entries: Iterable[Entry],
    environ: Mapping[str, str],
    errands: Iterable[Errand],
    outcomes: Iterable[Outcome],
) -> tuple[EntryReport, ...]:
    """One report for each entry that is no platform, in the order of the entries.

    Args:
        entries: As ``import_errands`` got them.
        environ: As ``import_errands`` got it.
        errands: What it gave.
        outcomes: What came back from them, in their order.
    """
    found: dict[Entry, EntryReport] = {}
    for errand, outcome in zip(errands, outcomes, strict=True):
        found |= _answered(errand, outcome)
    chosen = [entry for entry in entries if entry.group != PLATFORM_GROUP]
    allowed = AllowList.from_environ(environ)
    for entry in chosen:
        if entry not in found:
            found[entry] = _unasked(entry, chosen, allowed)
    return tuple(found[entry] for entry in chosen)


def import_report(entry: Entry) -> EntryReport:
    """Import the entry and see whether it is of its group's kind. Runs in a child process."""
    try:
        _CHECKS[kind_of(entry.group)](entry)
    except (LoadError, DovetailError) as error:
        return _report(entry, "broken", str(error))
    except (Exception, SystemExit) as error:
        return _report(entry, "broken", f"looking at it failed: {describe_error(error)}")
    return _report(entry, "fine")


def _answered(errand: Errand, outcome: Outcome) -> dict[Entry, EntryReport]:
    """The reports of a child; where it ended early, its culprit is the first without an answer."""
    reports = [EntryReport(**answer) for answer in outcome.answers]
    silent = errand.entries[len(reports) :]
    for entry in silent:
        after = f"not looked at, because with {silent[0].name} {outcome.complaint}"
        reports.append(_report(entry, "broken", outcome.complaint if entry == silent[0] else after))
    return dict(zip(errand.entries, reports, strict=True))


def _unasked(entry: Entry, entries: Iterable[Entry], allowed: AllowList) -> EntryReport:
    if kind_of(entry.group) not in GROUPS:
        first = nearest(entry.group, GROUPS)[0]
        return _report(entry, "broken", f"there is no group {entry.group}; did you mean {first}?")
    if not allowed.admits(entry):
        return _report(entry, "kept out")
    return _report(entry, "claimed twice", f"is {clash(_rivals(entry, entries, allowed))}")


def _rivals(entry: Entry, entries: Iterable[Entry], allowed: AllowList) -> list[Entry]:
    """Every admitted entry of the same name in the same group, itself included."""
    return [
        other
        for other in entries
        if (other.group, other.name) == (entry.group, entry.name) and allowed.admits(other)
    ]


def _report(entry: Entry, state: State, reason: str = "") -> EntryReport:
    line = " ".join(reason.split())
    return EntryReport(
        group=entry.group,
        name=entry.name,
        value=entry.value,
        distribution=entry.distribution,
        version=entry.version,
        state=state,
        reason=line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 3] + "...",
    )


def _check_attention(entry: Entry) -> None:
    found = import_entry(entry, refuse_backend)
    name = getattr(found, "name", None)
    if name != entry.name:
        raise LoadError(f"calls itself {name!r:.80}; the entry point says {entry.name!r}")


def _check_quant(entry: Entry) -> None:
    from dovetail.core.contracts.quant import QuantScheme

    import_entry(entry, subclass_of(QuantScheme))


def _check_model(entry: Entry) -> None:
    from dovetail.core.contracts.model import Model

    import_entry(entry, subclass_of(Model))


def _check_listener(entry: Entry) -> None:
    import pluggy

    from dovetail.core.plugins.hooks import DovetailHooks, add_listener

    manager = pluggy.PluginManager("dovetail")
    manager.add_hookspecs(DovetailHooks)
    add_listener(manager, import_entry(entry, _anything), entry)


def _check_processor(entry: Entry) -> None:
    from dovetail.core.contracts.logits import LogitsProcessor

    kind = import_entry(entry, subclass_of(LogitsProcessor))
    if callable(kind):
        kind()


def _anything(found: object) -> str | None:
    return f"is the class {found.__name__}, not an object" if isinstance(found, type) else None


_CHECKS: dict[str, Callable[[Entry], None]] = {
    ATTENTION_GROUP: _check_attention,
    "dovetail.quant": _check_quant,
    "dovetail.models": _check_model,
    "dovetail.hooks": _check_listener,
    "dovetail.logits_processors": _check_processor,
}
