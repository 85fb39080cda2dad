"""Level 1: what a plug-in says of itself. Nothing is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from dovetail.core.config.checkpoint import read_facts
from dovetail.core.config.installed import resolve_installed
from dovetail.core.config.resolved import ResolvedConfig
from dovetail.core.config.schema import EngineConfig
from dovetail.core.conformance.base import Check, expect, expect_equal
from dovetail.core.conformance.child import Seen, loaded_by, look_at
from dovetail.core.conformance.subject import Subject
from dovetail.core.contracts.platform import API_VERSION, FEATURES, Adjustment, Capabilities, Memory
from dovetail.core.types import ITEM_SIZE

__all__ = ["KV_DTYPES", "checks"]

KV_DTYPES = frozenset({"auto", *ITEM_SIZE, "int8", "fp8_e4m3", "fp8_e5m2"})
"""Dtypes that a KV cache can have."""
_PROBE_SECONDS = 1.0
_START = [
    f"dovetail.core.{name}"
    for name in (
        "cli",
        "config.resolve",
        "engine.build",
        "engine.core",
        "engine.process",
        "llm",
        "models.registry",
        "models.weights",
        "plugins.selection",
        "scheduler.scheduler",
        "server.app",
    )
]


def checks(subject: Subject) -> Iterator[Check]:
    """All of level 1."""
    for name, (function, statement) in _CHECKS.items():
        yield Check(name=f"contract.{name}", level=1, statement=statement, function=function)


def _seen(subject: Subject) -> Seen:
    return subject.once("probe", lambda: look_at(subject.entry))


def _import(subject: Subject) -> None:
    found = _seen(subject).frameworks
    expect(not found, f"finding and probing it imports {', '.join(found)}")


def _probe(subject: Subject) -> None:
    seen = _seen(subject)
    expect(seen.probe == "usable", f"the probe says {seen.probe}: {seen.reason}")
    expect(bool(seen.reason.strip()), "the probe gives no reason")
    expect(seen.num_devices >= 1, f"usable, but with {seen.num_devices} devices")


def _probe_time(subject: Subject) -> None:
    seconds = _seen(subject).seconds
    expect(
        seconds < _PROBE_SECONDS,
        f"import and probe took {seconds:.2f} s; at most {_PROBE_SECONDS:g} s are allowed",
    )


def _probe_silent(subject: Subject) -> None:
    printed = _seen(subject).printed
    expect(not printed, f"the probe wrote to standard output: {printed[:200]!r}")


def _plugin(subject: Subject) -> None:
    plugin = subject.plugin
    expect_equal("api_version", plugin.api_version, API_VERSION)
    expect(
        plugin.priority is None or type(plugin.priority) is int,
        f"priority is {plugin.priority!r}, neither an integer nor None",
    )
    for name, value in plugin.environment.items():
        expect(
            isinstance(name, str) and isinstance(value, str),
            f"environment[{name!r}] = {value!r}: names and values must be strings",
        )


def _name(subject: Subject) -> None:
    expect_equal("Platform.name", subject.platform.name, subject.entry.name)


def _capabilities(subject: Subject) -> None:
    able = subject.capabilities
    expect(isinstance(able, Capabilities), f"capabilities is a {type(able).__name__}")
    expect(bool(able.family) and isinstance(able.family, str), f"family is {able.family!r}")
    _known("dtypes", able.dtypes, frozenset(ITEM_SIZE))
    expect(
        able.slow_dtypes < set(able.dtypes) and able.dtypes[0] not in able.slow_dtypes,
        f"slow_dtypes {sorted(able.slow_dtypes)} must be some of dtypes, and not the first",
    )
    _known("kv_dtypes", able.kv_dtypes, KV_DTYPES)
    expect(isinstance(able.features, frozenset), "features must be a frozenset")
    unknown = sorted(able.features - FEATURES)
    expect(not unknown, f"features {unknown} are not known; known: {', '.join(sorted(FEATURES))}")
    sizes = able.block_sizes
    expect(
        isinstance(sizes, tuple) and len(set(sizes)) == len(sizes) > 0,
        f"block_sizes must be a tuple of different sizes, not {sizes!r}",
    )
    expect(all(type(s) is int and s > 0 for s in sizes), f"block sizes must be positive: {sizes}")
    tokens, seqs = able.max_num_batched_tokens, able.max_num_seqs
    expect(tokens >= seqs >= 1, f"max_num_batched_tokens {tokens}, max_num_seqs {seqs}")
    expect(
        "draft_model" not in able.features or "speculation" in able.features,
        "a draft_model is of no use without speculation",
    )


def _known(what: str, values: Any, known: frozenset[str]) -> None:
    expect(isinstance(values, tuple) and len(values) > 0, f"{what} must be a tuple, not empty")
    expect(len(set(values)) == len(values), f"{what} repeats itself: {values}")
    wrong = [value for value in values if value not in known]
    expect(not wrong, f"{what} has {wrong}; known: {', '.join(sorted(known))}")


def _devices(subject: Subject) -> None:
    names = subject.platform.device_names()
    expect(isinstance(names, list) and len(names) >= 1, f"device_names() gives {names!r:.200}")
    for name in names:
        expect(
            isinstance(name, str) and bool(name.strip()) and "\n" not in name,
            f"a device's name is {name!r:.200}; it must be one readable line",
        )


def _memory(subject: Subject) -> None:
    for device, name in enumerate(subject.platform.device_names()):
        memory = subject.platform.memory(device)
        expect(isinstance(memory, Memory), f"memory({device}) is a {type(memory).__name__}")
        expect(
            type(memory.free) is int and type(memory.total) is int,
            f"memory of {name} is {memory}; bytes are integers",
        )
        expect(0 <= memory.free <= memory.total > 0, f"memory of {name} is {memory}")


def _adjust(subject: Subject) -> None:
    intent = EngineConfig.from_kwargs(
        model=str(subject.shelf.checkpoint("llama")), dtype=subject.capabilities.dtypes[0]
    )
    resolved = resolve_installed(intent, read_facts(intent), subject.platform)
    settings = {f.name: getattr(resolved, f.name) for f in dataclasses.fields(ResolvedConfig)}
    changes = subject.platform.adjust(settings)
    expect(isinstance(changes, list), f"adjust() gives a {type(changes).__name__}, not a list")
    for change in changes:
        expect(isinstance(change, Adjustment), f"adjust() gives a {type(change).__name__}")
        expect(change.field in settings, f"{change.field!r} is no setting")
        expect(bool(change.reason.strip()), f"{change.field} is changed without a reason")


def _neutral(subject: Subject) -> None:
    found = loaded_by(_START)
    expect(not found, f"what every start imports has imported {', '.join(found)}")


_CHECKS = {
    "import": (_import, "Importing and probing the plug-in imports no framework."),
    "probe": (_probe, "The probe finds the hardware and says in a line what it found."),
    "probe_time": (_probe_time, "Import and probe take less than a second."),
    "probe_silent": (_probe_silent, "The probe writes nothing to standard output."),
    "plugin": (_plugin, "Interface version, priority and environment are of the right kind."),
    "name": (_name, "The platform has the name of its entry point."),
    "capabilities": (_capabilities, "Capabilities are complete, known and consistent."),
    "devices": (_devices, "Every device has a readable name."),
    "memory": (_memory, "Free memory is at most the total."),
    "adjust": (_adjust, "Adjustments name settings and give reasons."),
    "neutral": (_neutral, "What every start imports has no framework in it."),
}
