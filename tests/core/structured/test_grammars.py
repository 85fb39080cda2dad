"""The grammars of an engine's sequences, without an engine."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from dovetail.core.errors import RequestFailedError
from dovetail.core.request import Request, SamplingParams
from dovetail.core.structured.backend import Backend
from dovetail.core.structured.grammars import EngineGrammars
from dovetail.core.structured.vocabulary import Vocabulary
from tests.core.structured.cases import EOS, WIDTH, allowed, backend, grammar, tokenizer


def token(text: str) -> int:
    (one,) = tokenizer().encode(text, add_special_tokens=False)
    return one


A, B, C, Z = (token(letter) for letter in "abcz")


def request(number: int, source: str, emitted: list[int] | None = None) -> Request:
    return Request(
        id=number,
        prompt_token_ids=[5],
        params=SamplingParams(),
        stop_token_ids=[EOS],
        seed=0,
        arrival_time=0.0,
        emitted=emitted or [],
        grammar=source,
    )


def ready(grammars: EngineGrammars, *requests: Request) -> None:
    end = time.monotonic() + 20
    while not all(grammars.prepare(r) for r in requests):
        grammars.wait(0.05)
        assert time.monotonic() < end


@pytest.fixture
def grammars() -> EngineGrammars:
    return EngineGrammars(WIDTH, backend)


def masks_of(grammars: EngineGrammars, ids: list[int], counts: list[int]) -> list[list[int]]:
    return [allowed(row) for row in grammars.masks(ids, counts)]


def test_each_sequence_is_where_its_own_tokens_have_brought_it(grammars: EngineGrammars) -> None:
    source = grammar(regex="ab?c?")
    ready(grammars, request(1, source), request(2, source), request(3, source, [A, B]))
    assert grammars.accept(2, [A]).num_tokens == 1
    one, two, three = masks_of(grammars, [1, 2, 3], [0, 1, 2])
    assert A in one and B not in one and EOS not in one
    assert {B, C, EOS} <= set(two) and A not in two
    assert set(three) == {C, EOS}
    assert masks_of(grammars, [1, 2, 3], [0, 1, 2]) == [one, two, three], "masks change nothing"
    assert masks_of(grammars, [2], [1]) == [two], "one is worked out as several are"


def test_the_bits_are_as_wide_as_the_logits(grammars: EngineGrammars) -> None:
    ready(grammars, request(1, grammar(regex="[^\\n]+")))
    bits = grammars.masks([1], [0])
    assert bits.shape == (1, -(-WIDTH // 32)) and bits.dtype == np.int32
    assert max(allowed(bits[0])) < tokenizer().vocab_size, "no token without text is allowed"


def test_a_complete_answer_ends_with_or_without_an_end_token(grammars: EngineGrammars) -> None:
    source = grammar(regex="ab?")
    for number, (tokens, count, complete) in enumerate(
        [([A], 1, False), ([A, B], 2, True), ([A, EOS], 2, True), ([A, B, Z], 2, True)], 1
    ):
        ready(grammars, request(number, source))
        accepted = grammars.accept(number, tokens)
        assert (accepted.num_tokens, accepted.complete, accepted.error) == (count, complete, None)


def test_drafts_get_a_mask_each_and_leave_nothing_behind(grammars: EngineGrammars) -> None:
    source = grammar(regex="ab?c?")
    ready(grammars, request(1, source), request(2, source), request(3, source))
    grammars.accept(2, [A])
    before = masks_of(grammars, [1, 2, 3], [0, 1, 0])
    bits = grammars.masks([1, 2, 3], [0, 1, 0], [[A, C, B], [], [Z, A]])
    rows = [allowed(row) for row in bits]
    assert len(rows) == 4 + 1 + 3
    assert rows[0] == before[0] and rows[4] == before[1] and rows[5] == before[2]
    assert set(rows[1]) == {*before[1]}
    assert set(rows[2]) == {EOS}, "behind a and c"
    everything = list(range(32 * bits.shape[1]))
    assert rows[6] == rows[7] == everything, "behind a wrong draft"
    assert masks_of(grammars, [1, 2, 3], [0, 1, 0]) == before


@pytest.mark.parametrize(
    ("drafts", "count"),
    [([], 0), ([A, B, C], 3), ([A, C, B], 2), ([B], 0), ([A, EOS, B], 2), ([A, A], 1), ([EOS], 0)],
)
def test_drafts_are_valid_up_to_the_first_that_the_grammar_refuses(
    grammars: EngineGrammars, drafts: list[int], count: int
) -> None:
    ready(grammars, request(1, grammar(regex="ab?c?")))
    assert grammars.valid_drafts(1, drafts) == count
    assert grammars.accept(1, [A]).error is None, "nothing was taken in"


def test_the_masks_of_drafts_are_those_of_the_same_tokens_taken_in(
    grammars: EngineGrammars,
) -> None:
    schema = {"type": "object", "properties": {"ab": {"enum": ["x", "yy"]}}, "required": ["ab"]}
    source = grammar(json=schema)
    tokens = tokenizer().encode('{"ab": "yy"}', add_special_tokens=False)
    ready(grammars, request(1, source), request(2, source))
    assert grammars.valid_drafts(1, tokens) == len(tokens)
    together = grammars.masks([1], [0], [tokens])
    for count, token_id in enumerate(tokens):
        assert (grammars.masks([2], [count])[0] == together[count]).all()
        assert grammars.accept(2, [token_id]).error is None


def test_a_wrong_token_fails_its_request_alone(grammars: EngineGrammars) -> None:
    source = grammar(regex="ab?c?")
    ready(grammars, request(1, source), request(2, source))
    assert "does not fit" in str(grammars.accept(1, [A, Z]).error)
    broken, fine = grammars.masks([1, 2], [1, 0])
    assert (broken == -1).all() and A in allowed(fine)
    assert grammars.accept(1, [A]).error, "it stays failed"
    assert grammars.valid_drafts(1, [A]) == 0
    assert grammars.accept(2, [A]).error is None


def test_a_count_that_is_not_the_matchers_fails_the_request(grammars: EngineGrammars) -> None:
    ready(grammars, request(1, grammar(regex="ab?c?")))
    grammars.masks([1], [3])
    assert "at token 0 instead of 3" in str(grammars.accept(1, [A]).error)


def test_a_mask_that_costs_too_much_fails_the_request(grammars: EngineGrammars) -> None:
    # Every prefix of an answer is ambiguous in more ways than a step may follow.
    source = 'start: a\na: a a | "x" | "y" a | a "z" | a a a'
    ready(grammars, request(1, '{"grammars":[{"lark_grammar":' + json.dumps(source) + "}]}"))
    for count in range(2000):
        grammars.masks([1], [count])
        error = grammars.accept(1, [token("x")]).error
        if error is not None:
            assert "structured output failed" in error
            return
    pytest.fail("no limit was reached")


def test_tokens_that_were_emitted_elsewhere_are_taken_in(grammars: EngineGrammars) -> None:
    source = grammar(regex="ab?c?")
    ready(grammars, request(1, source, [A, B]), request(2, source, [Z]))
    assert set(allowed(grammars.masks([1], [2])[0])) == {C, EOS}
    assert "does not fit" in str(grammars.accept(2, [A]).error)


def test_nobody_waits_while_a_grammar_is_compiled() -> None:
    gate = threading.Event()

    def slow() -> Backend:
        gate.wait(10)
        return backend()

    grammars = EngineGrammars(WIDTH, slow)
    start = time.monotonic()
    assert not grammars.prepare(request(1, grammar(regex="ab")))
    grammars.wait(0.01)
    assert not grammars.prepare(request(1, grammar(regex="ab")))
    assert time.monotonic() - start < 2
    gate.set()
    ready(grammars, request(1, grammar(regex="ab")))
    assert len(grammars) == 1


def test_what_cannot_be_compiled_fails_at_its_first_token(grammars: EngineGrammars) -> None:
    ready(grammars, request(1, "start: ("))
    assert (grammars.masks([1], [0]) == -1).all()
    assert "cannot be compiled" in str(grammars.accept(1, [A]).error)


def test_a_vocabulary_that_cannot_be_read_fails_the_requests() -> None:
    def broken() -> Backend:
        raise RequestFailedError("no tokenizer")

    grammars = EngineGrammars(WIDTH, broken)
    ready(grammars, request(1, grammar(regex="ab")))
    assert grammars.masks([1], [0]).shape == (1, -(-WIDTH // 32))
    assert "no tokenizer" in str(grammars.accept(1, [A]).error)


def test_a_failure_to_compile_is_not_remembered() -> None:
    outcomes: list[Backend | None] = [None, backend()]

    def sometimes() -> Backend:
        outcome = outcomes.pop(0)
        if outcome is None:
            raise RequestFailedError("not now")
        return outcome

    grammars, source = EngineGrammars(WIDTH, sometimes), grammar(regex="ab")
    ready(grammars, request(1, source))
    assert "not now" in str(grammars.accept(1, [A]).error)
    ready(grammars, request(2, source))
    assert grammars.accept(2, [A]).error is None


def test_what_has_ended_is_forgotten(grammars: EngineGrammars) -> None:
    source = grammar(regex="ab")
    ready(grammars, request(1, source), request(2, source))
    grammars.prepare(request(3, grammar(regex="abc")))
    for number in (1, 2, 3, 4):
        grammars.forget(number)
    assert len(grammars) == 0


def test_compiling_is_shared_and_matchers_are_not(grammars: EngineGrammars) -> None:
    source = grammar(regex="ab?c?")
    ready(grammars, *(request(number, source) for number in range(1, 9)))
    grammars.accept(1, [A])
    first, *others = masks_of(grammars, list(range(1, 9)), [1] + [0] * 7)
    assert first != others[0] and all(mask == others[0] for mask in others)
    assert len(grammars._compiler._compiled) == 1
    grammars.close()


def test_without_an_end_token_an_answer_still_ends() -> None:
    """A model that names no end-of-text token."""
    known = backend().tokenizer
    tokens = [known.decode_bytes([i]) for i in range(256)]
    endless = Backend(Vocabulary(tokens=tokens, special=[0], ends=[]))
    grammars = EngineGrammars(256, lambda: endless)
    a, b = tokens.index(b"a"), tokens.index(b"b")
    ready(grammars, request(1, grammar(regex="ab?")))
    bits = grammars.masks([1], [0])
    assert bits.shape == (1, 8) and allowed(bits[0]) == [a]
    assert not grammars.accept(1, [a]).complete
    assert allowed(grammars.masks([1], [1])[0]) == [b]
    assert grammars.accept(1, [b]).complete
