"""Requests with a grammar among others, over the oracle and grammars of a few lines."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from dovetail.core.batch import Batch
from dovetail.core.config.speculative import SpeculativeConfig
from dovetail.core.engine.core import EngineCore
from dovetail.core.errors import InvariantError
from dovetail.core.request import Request
from dovetail.core.scheduler.masking import token_masks
from dovetail.core.structured.base import Accepted
from dovetail.core.types import IntArray
from tests.core.oracle import EOS, VOCAB, expected, make_engine, make_request, run

WIDTH = -(-VOCAB // 32)


class CountingGrammars:
    """A grammar is how long its answer may be: ``"7"`` ends after seven tokens, ``"!3"`` fails
    at the third. All tokens are allowed; bits beyond the vocabulary hold the sequence's id."""

    def __init__(self) -> None:
        self.ready = True
        self.known: dict[int, tuple[Request, list[int]]] = {}
        self.num_waits = 0

    def prepare(self, request: Request) -> bool:
        if self.ready:
            self.known.setdefault(request.id, (request, list(request.emitted)))
        return request.id in self.known

    def wait(self, seconds: float) -> None:
        assert seconds < 0.01
        self.num_waits += 1

    def masks(
        self,
        ids: Sequence[int],
        num_generated: Sequence[int],
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> IntArray:
        assert [len(self.known[i][1]) for i in ids] == list(num_generated), "exactly what came"
        counts = [1 + len(d) for d in drafts] if drafts is not None else [1] * len(ids)
        bits = np.full((sum(counts), WIDTH), -1, np.int32)
        bits[:, -1] = np.repeat(np.array(ids, np.int32) << VOCAB % 32, counts) | 0xFF
        return bits

    def valid_drafts(self, request_id: int, drafts: Sequence[int]) -> int:
        return len(drafts)

    def accept(self, request_id: int, token_ids: Sequence[int]) -> Accepted:
        request, taken = self.known[request_id]
        taken.extend(token_ids)
        if request.grammar.startswith("!"):
            failed = len(taken) >= int(request.grammar[1:])
            return Accepted(0, False, "structured output failed: as told" if failed else None)
        beyond = max(0, len(taken) - int(request.grammar))
        return Accepted(len(token_ids) - beyond, len(taken) >= int(request.grammar))

    def forget(self, request_id: int) -> None:
        self.known.pop(request_id, None)


@pytest.fixture
def grammars() -> CountingGrammars:
    return CountingGrammars()


def batches(engine: EngineCore) -> list[Batch]:
    found: list[Batch] = engine.runner.batches  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("num_blocks", [34, 400])
@pytest.mark.parametrize("budget", [8, 64])
def test_all_get_their_tokens_and_grammars_see_exactly_theirs(
    grammars: CountingGrammars, drafts: bool, steps_ahead: int, num_blocks: int, budget: int
) -> None:
    rng = random.Random(num_blocks + budget)
    engine = make_engine(
        steps_ahead=steps_ahead,
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        grammars=grammars,
        speculation=SpeculativeConfig.parse({"model": "a draft", "adaptive": False})
        if drafts
        else None,
    )
    lengths: dict[int, int] = {}
    requests = []
    for i in range(1, 31):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 50))]
        most, own = rng.randrange(1, 40), rng.randrange(1, 40)
        grammar = str(own) if i % 3 else ""
        lengths[i] = min(most, own) if grammar else most
        requests.append(make_request(i, prompt, most, grammar=grammar))
        engine.add(requests[-1])
    answers = run(engine)
    for request in requests:
        want = expected(request.prompt_token_ids, lengths[request.id], EOS)
        assert answers[request.id] == want
    if num_blocks == 34:
        assert engine.scheduler.stats.num_preemptions > 0
    assert not grammars.known, "all are forgotten"
    for batch in batches(engine):
        masks = batch.sampling.masks
        if masks is not None:
            counts = 1 if batch.num_drafts is None else batch.num_drafts + 1
            rows = batch.rows[batch.sampled].repeat(counts)[masks.places]
            assert masks.bits.shape == (len(rows), WIDTH)
            assert batch.num_drafts is not None or len(set(rows)) == len(rows)
            assert not len(batch.carried) or not set(rows) & set(batch.carried_rows)


def test_a_complete_answer_ends_with_stop_even_at_the_limit(grammars: CountingGrammars) -> None:
    engine = make_engine(grammars=grammars)
    for number, (grammar, most, reason) in enumerate(
        [("3", 9, "stop"), ("3", 3, "stop"), ("9", 3, "length")], 1
    ):
        engine.add(make_request(number, [number], most, grammar=grammar, stop_token_ids=[]))
        reasons = []
        while engine.has_work():
            reasons += [u.finish_reason for u in engine.step()]
        assert reasons == [None] * 2 + [reason]


def test_who_waits_for_a_grammar_holds_up_nobody(grammars: CountingGrammars) -> None:
    engine = make_engine(grammars=grammars, max_num_seqs=1)
    grammars.ready = False
    engine.add(make_request(1, [1, 2], 9, grammar="4", stop_token_ids=[]))
    engine.add(make_request(2, [3, 4], 5, stop_token_ids=[]))
    seen = [update.id for _ in range(8) for update in engine.step()]
    assert seen == [2] * 5
    assert engine.has_work() and engine.scheduler.num_waiting == 1
    assert grammars.num_waits > 0, "the loop rests instead of spinning"
    grammars.ready = True
    assert run(engine) == {1: expected([1, 2], 4)}


def test_who_waits_for_a_grammar_can_be_aborted(grammars: CountingGrammars) -> None:
    engine = make_engine(grammars=grammars)
    grammars.ready = False
    engine.add(make_request(1, [1, 2], 9, grammar="4"))
    assert engine.step() == []
    engine.abort([1])
    assert not engine.has_work()


def test_completions_that_share_a_prefill_have_a_grammar_each(grammars: CountingGrammars) -> None:
    engine = make_engine(grammars=grammars, num_blocks=400)
    prompt = list(range(30))
    for number, own in [(1, "5"), (2, "2"), (3, "7")]:
        parent = 1 if number > 1 else None
        engine.add(make_request(number, prompt, 20, grammar=own, parent=parent, stop_token_ids=[]))
    assert run(engine) == {i: expected(prompt, n) for i, n in [(1, 5), (2, 2), (3, 7)]}


def test_children_of_a_parent_that_ends_early_wait_for_their_grammar(
    grammars: CountingGrammars,
) -> None:
    engine = make_engine(grammars=grammars)
    grammars.ready = False
    engine.add(make_request(1, [1, 2], 20, grammar="5"))
    engine.add(make_request(2, [1, 2], 20, grammar="2", parent=1, stop_token_ids=[]))
    engine.abort([1])
    assert engine.step() == []
    grammars.ready = True
    assert run(engine) == {2: expected([1, 2], 2)}


def test_a_grammar_that_fails_fails_its_request_alone(grammars: CountingGrammars) -> None:
    engine = make_engine(grammars=grammars)
    for number, own in [(1, "!3"), (2, "9"), (3, "")]:
        engine.add(make_request(number, [number], 9, grammar=own, stop_token_ids=[]))
    answers: dict[int, list[int]] = {}
    errors = {}
    while engine.has_work():
        for update in engine.step():
            answers.setdefault(update.id, []).extend(update.token_ids)
            if update.error is not None:
                errors[update.id] = update.error
    assert errors == {1: "structured output failed: as told"}
    assert answers == {1: expected([1], 2), 2: expected([2], 9), 3: expected([3], 9)}
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


def test_a_request_goes_on_behind_what_another_process_emitted(grammars: CountingGrammars) -> None:
    engine = make_engine(grammars=grammars)
    emitted = expected([5], 3)
    engine.add(make_request(1, [5], 20, grammar="6", emitted=emitted, stop_token_ids=[]))
    assert run(engine) == {1: expected([5], 6)[3:]}


def test_a_step_that_raises_leaves_grammars_where_they_were(grammars: CountingGrammars) -> None:
    engine = make_engine(grammars=grammars)
    for number in (1, 2, 3):
        engine.add(make_request(number, [number], 9, grammar="7", stop_token_ids=[]))
    failures = [5]

    def fail(batch: Batch) -> None:
        if batch.step in failures:
            raise RuntimeError("once")

    engine.runner.fail = fail  # type: ignore[attr-defined]
    assert run(engine) == {i: expected([i], 7) for i in (1, 2, 3)}


def test_logits_that_are_not_finite_do_not_move_the_grammar(grammars: CountingGrammars) -> None:
    engine = make_engine(grammars=grammars)
    engine.runner.poison = {9}  # type: ignore[attr-defined]
    engine.add(make_request(1, [9, 9], 9, grammar="7"))
    updates = [update for _ in range(3) for update in engine.step()]
    assert [u.finish_reason for u in updates] == ["error"] and not updates[0].token_ids
    assert not grammars.known


def test_drafts_take_places_behind_their_row(grammars: CountingGrammars) -> None:
    engine = make_engine(grammars=grammars)
    for number, own in [(1, "90"), (2, ""), (3, "90")]:
        engine.add(make_request(number, [number], 90, grammar=own, stop_token_ids=[]))
    engine.step()
    rows = engine.scheduler.table.order
    masks = token_masks(engine.scheduler.table, grammars, rows, np.array([2, 1, 0], np.int32))
    assert masks is not None
    assert masks.places.tolist() == [0, 1, 2, 5]
    assert (masks.bits[:, -1] >> VOCAB % 32).tolist() == [1, 1, 1, 3]
    assert token_masks(engine.scheduler.table, grammars, rows[1:2]) is None


def test_an_engine_without_grammars_says_so() -> None:
    engine = make_engine()
    with pytest.raises(InvariantError, match="has a grammar"):
        engine.add(make_request(1, [1], 5, grammar="5"))
