"""The examining process: ``python -m dovetail.core.structured.child``.

Reads a :class:`Vocabulary` and then constraints from standard input, and answers each with a
:class:`Verdict` on standard output. A constraint that takes too long or too much memory ends this
process, and nothing else.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from llguidance import LLMatcher

from dovetail.core.constraint import StructuredOutputsParams
from dovetail.core.structured.backend import Backend, first_line, new_matcher
from dovetail.core.structured.frames import Verdict, read_frame, write_frame
from dovetail.core.structured.limits import ANSWER_S, COMPILE_S, EXTRA_BYTES, STACK_BYTES
from dovetail.core.structured.source import grammar_source
from dovetail.core.structured.vocabulary import Vocabulary

__all__ = ["examine", "main"]

_TRIAL_TOKENS = 16
"""Tokens to follow a grammar for: what costs too much often does so soon."""
_PAGE = resource.getpagesize()


def examine(form: StructuredOutputsParams, backend: Backend) -> Verdict:
    """Compile the constraint, and follow it for a few tokens."""
    try:
        grammar = grammar_source(form)
    except (ValueError, RecursionError) as error:
        return _refused(str(error))
    matcher = new_matcher(backend.tokenizer, grammar)
    if matcher.is_error():
        return _refused(matcher.get_error())
    ends = set(backend.tokenizer.eos_tokens)
    for count in range(_TRIAL_TOKENS):
        tokens = [token for token in _allowed(matcher, backend) if token not in ends]
        if matcher.is_error():
            return _refused(f"at token {count + 1}: {first_line(matcher.get_error())}")
        if not tokens and not count:
            return _refused("no text but the empty one fits")
        if not tokens or not matcher.consume_token(tokens[len(tokens) // 2]):
            break
    if matcher.is_error():
        return _refused(first_line(matcher.get_error()))
    return Verdict(grammar=grammar)


def _allowed(matcher: LLMatcher, backend: Backend) -> list[int]:
    """What may come next, worked out in the kind of thread in which the engine does."""
    bits = np.zeros((2, -(-backend.tokenizer.vocab_size // 32)), np.int32)
    backend.fill([(matcher, 0, []), (matcher.deep_copy(), 1, [])], bits)
    allowed = np.unpackbits(bits[0].view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(allowed)]


def _refused(error: str) -> Verdict:
    return Verdict(reason=first_line(error) or "it cannot be compiled")


def _limit_memory() -> None:
    """From now on no more than ``EXTRA_BYTES``; where the system does not say, no limit."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        most = int(statm.read_text().split()[0]) * _PAGE + EXTRA_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    data = read_frame(requests)
    if data is None:
        return
    backend = Backend(msgspec.msgpack.decode(data, type=Vocabulary))
    _limit_memory()
    write_frame(answers, Verdict())
    while (data := read_frame(requests)) is not None:
        form = msgspec.msgpack.decode(data, type=StructuredOutputsParams)
        signal.setitimer(signal.ITIMER_PROF, COMPILE_S)
        # Ends this process also when nobody is left to do so.
        signal.setitimer(signal.ITIMER_REAL, ANSWER_S + 1)
        verdict = examine(form, backend)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_frame(answers, verdict)


def main() -> int:
    """Serve until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    streams = (sys.stdin.buffer, sys.stdout.buffer)
    worker = threading.Thread(target=_serve, args=streams, name="examine")
    worker.start()
    worker.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
