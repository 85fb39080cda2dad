"""Hooks that many may listen to: the life of requests, and the figures of each step.

A package listens through the entry-point group ``dovetail.hooks``; the entry point names a module
or an object whose methods carry ``hookimpl``::

    from dovetail.core.plugins.hooks import hookimpl

    @hookimpl
    def dovetail_request_finished(request, finish_reason):
        ...

A listener takes the arguments that it wants, by name. It runs in the process that serves requests
and must be quick. What it raises is logged with its package, and the other listeners and the
request go on.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pluggy

from dovetail.core.errors import PluginError
from dovetail.core.faults import fault
from dovetail.core.plugins.entries import AllowList, Entry
from dovetail.core.plugins.registry import Registry
from dovetail.core.request import FinishReason, Request

__all__ = ["HOOK_GROUP", "DovetailHooks", "add_listener", "hook_manager", "hookimpl"]

HOOK_GROUP = "dovetail.hooks"

_PREFIX = "dovetail_"

hookspec = pluggy.HookspecMarker("dovetail")
hookimpl = pluggy.HookimplMarker("dovetail")
"""Marks a listener."""

logger = logging.getLogger(__name__)


class DovetailHooks:
    """The hooks. What a listener returns is not used; it must not change what it is given."""

    @hookspec
    def dovetail_request_started(self, request: Request) -> None:
        """The request was validated and is on its way to the engine."""

    @hookspec
    def dovetail_request_finished(
        self, request: Request, finish_reason: FinishReason, num_generated: int, seconds: float
    ) -> None:
        """The request has ended, in whatever way.

        Args:
            request: As it was when it started.
            finish_reason: ``stop``, ``length``, ``abort``, ``timeout`` or ``error``.
            num_generated: Tokens that it generated.
            seconds: From its arrival to its end.
        """

    @hookspec
    def dovetail_step_finished(self, stats: Mapping[str, float]) -> None:
        """The engine has reported on a step: its counters and gauges, by name."""


def hook_manager(environ: Mapping[str, str]) -> pluggy.PluginManager:
    """A manager with every listener that is installed and that ``DOVETAIL_PLUGINS`` admits.

    Call hooks as ``manager.hook.dovetail_request_started(request=...)``.

    Raises:
        PluginError: A listener cannot be imported, names a hook or an argument that does not
            exist, or two packages offer it under one name; names package and version.
    """
    manager = pluggy.PluginManager("dovetail")
    manager.add_hookspecs(DovetailHooks)
    allowed = AllowList.from_environ(environ)
    registry = Registry[object](HOOK_GROUP, "listener", _refuse_class, allowed=allowed)
    for name in registry.names():
        add_listener(manager, registry.load(name), registry.entry(name))
    return manager


def add_listener(manager: pluggy.PluginManager, listener: object, entry: Entry) -> None:
    """Register the hook functions of a module or object.

    Raises:
        PluginError: A function names a hook or an argument that does not exist, lacks
            ``hookimpl``, or is a wrapper; or there is no hook function at all.
    """
    functions = {name: getattr(listener, name) for name in dir(listener) if _is_hook(name)}
    functions = {name: found for name, found in functions.items() if callable(found)}
    origin = f"The listener {entry.name!r} ({entry.origin}, {entry.value})"
    if not functions:
        raise PluginError(f"{origin} has no function whose name begins with {_PREFIX}.")
    for name, function in functions.items():
        complaint = _complaint(function)
        if complaint is not None:
            raise PluginError(f"{origin} has a function {name} that {complaint}.")
    guarded = SimpleNamespace(
        **{name: _guard(function, entry) for name, function in functions.items()}
    )
    try:
        manager.register(guarded, name=f"{entry.distribution}:{entry.name}")
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        if manager.is_registered(guarded):
            manager.unregister(guarded)
        raise PluginError(f"{origin} is refused: {' '.join(str(error).split())}") from error


def _complaint(function: Callable[..., Any]) -> str | None:
    if not hasattr(function, "dovetail_impl"):
        return "is not marked with hookimpl"
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        return "is a generator, a wrapper or a coroutine; a listener is a plain function"
    return None


def _guard(function: Callable[..., Any], entry: Entry) -> Callable[..., Any]:
    """The same function, except that an error goes to the log and not to the caller."""

    @functools.wraps(function)
    def guarded(*arguments: object) -> None:
        try:
            fault("hooks", next((a.id for a in arguments if isinstance(a, Request)), None))
            function(*arguments)
        except Exception:
            logger.exception(
                "The listener %s of %s (%s) failed.", function.__name__, entry.name, entry.origin
            )

    return guarded


def _refuse_class(found: object) -> str | None:
    return f"is the class {found.__name__}, not an object" if isinstance(found, type) else None


def _is_hook(name: str) -> bool:
    return name.startswith(_PREFIX)
