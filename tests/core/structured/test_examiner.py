"""Hostile constraints cost their sender an error, and nobody else anything."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail.core.constraint import StructuredOutputsParams
from dovetail.core.errors import OverloadedError, RequestError
from dovetail.core.structured import examiner as module
from dovetail.core.structured.examiner import Examiner
from dovetail.core.structured.limits import ANSWER_S, COMPILE_S, EXTRA_BYTES
from dovetail.core.structured.vocabulary import Vocabulary, read_vocabulary
from tests.core.structured.cases import EOS, WIDTH, tokenizer

GOOD = StructuredOutputsParams(regex="[ab]{3}")
PATIENCE_S = ANSWER_S + 5
"""What a refusal may take on a busy machine: the limit, and perhaps the start of a process."""


def vocabulary() -> Vocabulary:
    return read_vocabulary(tokenizer(), WIDTH, [EOS])


@pytest.fixture(scope="module")
def examiner() -> Iterator[Examiner]:
    made = Examiner(vocabulary)
    assert made.grammar(GOOD)
    yield made
    made.close()


def nested(depth: int) -> str:
    return '{"type":"object","properties":{"a":' * depth + '{"type":"string"}' + "}}" * depth


def slow(prefix: str) -> dict[str, Any]:
    """What takes longer to compile than is given."""
    return {"json": {"properties": {f"{prefix}{i}": {"type": "string"} for i in range(9000)}}}


def ways(number: int) -> dict[str, Any]:
    return {"properties": {"k": {"const": f"k{number}"}, "v": {"type": "integer"}}}


HARMLESS: dict[str, dict[str, Any]] = {
    "exponential for others": {"regex": "(a+)+$"},
    "ambiguous repetition": {"regex": "(a|aa){1,1000}b"},
    "a large automaton": {"regex": "(a|b)*a(a|b){30}"},
    "repeated repetition": {"regex": "((a{1,100}){1,100}){1,100}"},
    "left recursion": {"grammar": 'start: start "a" | "b"'},
    "a cycle of rules": {"grammar": 'start: a\na: b\nb: a | "x"'},
    "an ambiguous pattern": {"json": {"type": "string", "pattern": "^(a|aa){1,1000}b$"}},
    "a schema that is true": {"json": "true"},
    "very many choices": {"choice": [f"v{i}" for i in range(60_000)]},
}
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "too many properties": (slow("p"), "takes more than"),
    "too many ways": ({"json": {"anyOf": [ways(i) for i in range(500)]}}, "too many|items"),
    "deep nesting": ({"json": nested(10_000)}, "recursion limit"),
    "a loop of references": (
        {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
        "at token 1",
    ),
    "deep parentheses": ({"grammar": "start: " + "(" * 10_000 + '"a"' + ")" * 10_000}, "nested"),
    "deep groups": ({"regex": "(" * 10_000 + "a" + ")" * 10_000}, "invalid regex"),
    "an unknown type": ({"json": {"type": "strin"}}, "Invalid type"),
    "an unknown keyword": ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    "an unknown format": ({"json": {"type": "string", "format": "phone"}}, "Unknown format"),
    "a remote reference": ({"json": {"$ref": "http://127.0.0.1:1/x"}}, "not present"),
    "a local file": ({"json": {"$ref": "file:///etc/passwd"}}, "not present"),
    "no JSON": ({"json": "{"}, "EOF"),
    "no schema": ({"json": "[1]"}, "object"),
    "a schema that is false": ({"json": "false"}, "not"),
    "no expression": ({"regex": "(a"}, "invalid regex"),
    "look-around": ({"regex": "(?=a)a"}, "invalid regex"),
    "a back reference": ({"regex": r"(a)\1"}, "invalid regex"),
    "no grammar": ({"grammar": "start: "}, "no text but the empty one"),
    "an unknown rule": ({"grammar": 'root ::= "a" other'}, "other"),
    "nothing but the empty text": ({"regex": "a{0}"}, "no text but the empty one"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_bad_is_compiled(examiner: Examiner, name: str) -> None:
    start = time.monotonic()
    assert examiner.grammar(StructuredOutputsParams(**HARMLESS[name]))
    assert time.monotonic() - start < PATIENCE_S


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_bad_is_refused_in_time_and_others_go_on(examiner: Examiner, name: str) -> None:
    form, reason = HOSTILE[name]
    start = time.monotonic()
    with pytest.raises(RequestError, match=reason) as refusal:
        examiner.grammar(StructuredOutputsParams(**form))
    assert time.monotonic() - start < PATIENCE_S
    assert refusal.value.status == 400
    assert refusal.value.param == f"structured_outputs.{next(iter(form))}"
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
    assert examiner.grammar(StructuredOutputsParams(regex=f"[ab]{{{1 + len(name)}}}"))


def test_what_is_too_long_is_refused_at_once() -> None:
    enum = {"enum": [f"value {i}" for i in range(100_000)]}
    for form in ({"json": enum}, {"regex": "a" * 600_000}, {"choice": ["x" * 600_000]}):
        with pytest.raises(RequestError, match="characters"):
            StructuredOutputsParams(**form)


def test_memory_is_bounded() -> None:
    process = module._Process(vocabulary())
    limits = Path(f"/proc/{process._process.pid}/limits").read_text()
    process.end()
    line = next(line for line in limits.splitlines() if line.startswith("Max address space"))
    assert EXTRA_BYTES < int(line.split()[3]) < EXTRA_BYTES + (2 << 30)


def test_a_process_that_dies_of_a_constraint_takes_only_that_with_it() -> None:
    made = Examiner(vocabulary)
    made.grammar(GOOD)
    (process,) = made._idle
    killer = threading.Timer(0.3, process._process.send_signal, (signal.SIGABRT,))
    killer.start()
    with pytest.raises(RequestError, match="MiB, or is nested too deeply"):
        made.grammar(StructuredOutputsParams(**slow("y")))
    assert made.grammar(StructuredOutputsParams(regex="[ab]{4}"))
    assert made._idle != [process]
    made.close()


def stop(process: Any) -> None:
    """Stop it, and wait until it has stopped: a signal is not there the moment it is sent."""
    process._process.send_signal(signal.SIGSTOP)
    state = Path(f"/proc/{process._process.pid}/stat")
    while state.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)


def test_a_machine_that_is_busy_with_others_is_no_reason_to_refuse() -> None:
    made = Examiner(vocabulary)
    made.grammar(GOOD)
    (process,) = made._idle
    stop(process)
    timer = threading.Timer(COMPILE_S + 0.3, process._process.send_signal, (signal.SIGCONT,))
    timer.start()
    assert made.grammar(StructuredOutputsParams(regex="[ab]{5}"))
    assert made._idle == [process]
    made.close()


def test_a_process_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.2)
    made = Examiner(vocabulary)
    made.grammar(GOOD)
    stop(made._idle[0])
    with pytest.raises(RequestError, match=r"takes more than 0\.2 s"):
        made.grammar(StructuredOutputsParams(regex="[ab]{6}"))
    assert not made._idle
    made.close()


def test_a_second_asker_gets_what_the_first_found(examiner: Examiner) -> None:
    form = StructuredOutputsParams(**slow("w"))
    with pytest.raises(RequestError):
        examiner.grammar(form)
    start = time.monotonic()
    with pytest.raises(RequestError):
        examiner.grammar(form)
    assert time.monotonic() - start < COMPILE_S / 2


async def test_the_event_loop_goes_on_and_a_cancelled_asker_spoils_nothing(
    examiner: Examiner,
) -> None:
    form = StructuredOutputsParams(**slow("x"))
    first = asyncio.create_task(examiner.grammar_async(form))
    second = asyncio.create_task(examiner.grammar_async(form))
    turns = 0
    await asyncio.sleep(0.01)
    first.cancel()
    while not second.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns > 20
    with pytest.raises(RequestError, match="takes more than"):
        await second


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUEUE", 0)
    made = Examiner(vocabulary)
    with pytest.raises(OverloadedError):
        made.grammar(GOOD)
    made.close()


def test_a_failure_that_is_not_the_constraints_is_not_remembered() -> None:
    outcomes: list[Vocabulary | RequestError] = [RequestError("not now"), vocabulary()]

    def read() -> Vocabulary:
        outcome = outcomes.pop(0)
        if isinstance(outcome, RequestError):
            raise outcome
        return outcome

    made = Examiner(read)
    with pytest.raises(RequestError, match="not now"):
        made.grammar(GOOD)
    assert made.grammar(GOOD)
    made.close()


def test_the_processes_end_with_their_owner() -> None:
    made = Examiner(vocabulary)
    made.grammar(GOOD)
    (process,) = made._idle
    made.close()
    assert process._process.poll() is not None
