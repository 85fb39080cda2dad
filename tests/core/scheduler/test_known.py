"""Rows whose next token needs the host are never computed ahead of their own token."""

from __future__ import annotations

from dovetail.core.batch import Batch
from dovetail.core.request import SamplingParams
from tests.core.oracle import expected, make_engine, make_request, run


def test_a_row_with_a_logits_processor_is_not_computed_ahead() -> None:
    engine = make_engine(steps_ahead=1, num_blocks=400)
    with_processor = SamplingParams(temperature=0.0, max_tokens=20, logits_processors={"x": 1})
    engine.add(make_request(1, [1, 2, 3], 20, stop_token_ids=[]))
    engine.add(make_request(2, [4, 5, 6], 20, params=with_processor, stop_token_ids=[]))
    answers = run(engine)
    assert answers == {1: expected([1, 2, 3], 20), 2: expected([4, 5, 6], 20)}
    batches: list[Batch] = engine.runner.batches  # type: ignore[attr-defined]
    rows = {int(j.token_ids[0]): j.row for b in batches for j in b.joined}
    carried = [row for b in batches for row in b.carried_rows.tolist()]
    assert rows[4] not in carried
    assert carried.count(rows[1]) > 10, "the other row goes ahead all the same"
