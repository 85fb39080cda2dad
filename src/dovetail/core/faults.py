"""Named points at which faults can be ordered, to see that the rest bears them.

``DOVETAIL_FAULTS`` orders them, one rule after another, separated by semicolons::

    runner.step:raise@50              the 50th step raises
    frontend.text:raise@req=7         whenever request 7 is turned into text
    engine.loop:hang@p=0.01           in one turn of a hundred
    runner.result:delay=0.2@every=10  each tenth time, for 0.2 s
    engine.inbox:drop@3@req=7         several conditions: all must hold

Without the variable a point costs the look-up of its name in an empty dictionary.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dovetail.core.errors import ConfigError, InjectedError

__all__ = ["POINTS", "VARIABLE", "arm", "armed", "fault", "message_faults"]

VARIABLE = "DOVETAIL_FAULTS"

POINTS: dict[str, str] = {
    "engine.inbox": "the engine process takes a message; knows drop, dup and corrupt",
    "engine.loop": "each turn of the engine process's loop",
    "engine.outbox": "the engine process sends a message; knows drop, dup and corrupt",
    "frontend.deliver": "what is new is handed to a request's stream; per request",
    "frontend.intake": "a request is validated; per request",
    "frontend.logprobs": "a sequence's log-probabilities are named; per request",
    "frontend.stop": "a sequence's text is searched for stop strings; per request",
    "frontend.text": "a sequence's tokens are turned into text; per request",
    "hooks": "a listener is called; per request, but for reports on steps",
    "pool.allocate": "KV blocks are taken",
    "runner.result": "the result of a step is read",
    "runner.step": "a step is started",
    "sampler.row": "a row's own rules change its logits; per request",
    "scheduler.admit": "the engine takes up a request; per request",
    "scheduler.result": "a row's result is completed: its end, its log-probabilities; per request",
}
"""Every point with its place. ``per request``: the condition ``req`` can be used."""

_ACTIONS = ("raise", "delay", "hang", "kill")
_MESSAGE_ACTIONS = ("drop", "dup", "corrupt")
_MESSAGE_POINTS = ("engine.inbox", "engine.outbox")


@dataclass
class _Rule:
    """One order: what to do at a point, and when."""

    point: str
    action: str
    value: float
    nth: int | None = None
    every: int | None = None
    probability: float | None = None
    request: int | None = None
    hits: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def applies(self, request: int | None) -> bool:
        """Whether this is one of the times. Only those that fit ``request`` are counted."""
        if self.request is not None and request != self.request:
            return False
        self.hits += 1
        if self.nth is not None and self.hits != self.nth:
            return False
        if self.every is not None and self.hits % self.every:
            return False
        return self.probability is None or self.rng.random() < self.probability


_RULES: dict[str, list[_Rule]] = {}


def arm(environ: Mapping[str, str] = os.environ) -> None:
    """Take over the orders of ``DOVETAIL_FAULTS``, in place of those before.

    Raises:
        ConfigError: A point, an action or a condition is unknown; lists those there are.
    """
    rules = [
        _parse(text) for part in environ.get(VARIABLE, "").split(";") if (text := part.strip())
    ]
    _RULES.clear()
    for rule in rules:
        _RULES.setdefault(rule.point, []).append(rule)


def armed(point: str) -> bool:
    """Whether anything was ordered for the point: for places that would have to loop for it."""
    return point in _RULES


def fault(point: str, request: int | None = None) -> None:
    """Do here what was ordered for this point.

    Args:
        point: One of ``POINTS``.
        request: ``Request.id``, where the code is one request's.

    Raises:
        InjectedError: That was ordered.
    """
    rules = _RULES.get(point)
    if rules is not None:
        _act(rules, point, request)


def message_faults(point: str, data: bytes) -> list[bytes]:
    """The messages that take the place of this one: none, itself, itself twice, or another."""
    rules = _RULES.get(point)
    if rules is None:
        return [data]
    fault(point)
    messages = [data]
    for rule in rules:
        if rule.action in _MESSAGE_ACTIONS and rule.applies(None):
            messages = _CHANGES[rule.action](messages)
    return messages


def _act(rules: list[_Rule], point: str, request: int | None) -> None:
    for rule in rules:
        if rule.action in _ACTIONS and rule.applies(request):
            if rule.action == "raise":
                raise InjectedError(f"a fault was ordered at {point}")
            if rule.action == "delay":
                time.sleep(rule.value)
            elif rule.action == "hang":
                threading.Event().wait()
            else:
                os.kill(os.getpid(), signal.SIGKILL)


_CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "drop": lambda messages: [],
    "dup": lambda messages: messages * 2,
    "corrupt": lambda messages: [bytes([data[0] ^ 0xFF]) + data[1:] for data in messages],
}


def _parse(text: str) -> _Rule:
    point, colon, rest = text.partition(":")
    if point not in POINTS or not colon:
        raise ConfigError(
            f"{VARIABLE}: {text!r} is not POINT:ACTION@CONDITION; points: {', '.join(POINTS)}."
        )
    action, *conditions = rest.split("@")
    action, _, value = action.partition("=")
    known = _ACTIONS + (_MESSAGE_ACTIONS if point in _MESSAGE_POINTS else ())
    if action not in known:
        raise ConfigError(
            f"{VARIABLE}: {point} has no action {action!r}; actions: {', '.join(known)}."
        )
    try:
        rule = _Rule(point, action, float(value or 0.1), rng=random.Random(text))
        for condition in conditions:
            _add_condition(rule, condition)
    except ValueError:
        raise ConfigError(
            f"{VARIABLE}: {text!r} has a condition that is none of N, every=N, p=SHARE, req=ID."
        ) from None
    return rule


def _add_condition(rule: _Rule, text: str) -> None:
    """Raises ValueError for one that is unknown."""
    name, equals, value = text.partition("=")
    if not equals:
        rule.nth = int(name)
    elif name == "every" and int(value) > 0:
        rule.every = int(value)
    elif name == "p":
        rule.probability = float(value)
    elif name == "req":
        rule.request = int(value)
    else:
        raise ValueError(text)
