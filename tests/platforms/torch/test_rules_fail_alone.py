"""A request whose rules cannot be taken up, or fail, ends; the others get their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dovetail.core.batch import JoinedRow
from dovetail.core.request import Request, SamplingParams
from dovetail.platforms.torch.sampling.penalties import Penalties
from dovetail.platforms.torch.sampling.shaping import Shaper
from tests.checkpoints import make_checkpoint
from tests.engines import make_core

VICTIM = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def answers(model: Path) -> tuple[dict[int, list[int]], dict[int, str]]:
    """Tokens and errors of four requests, each with rules of its own."""
    core = make_core(model, "reference")
    for number in range(1, 5):
        params = SamplingParams(
            temperature=0.0, max_tokens=6, logit_bias={9: 1.0}, frequency_penalty=0.5
        )
        core.add(
            Request(
                id=number,
                prompt_token_ids=[5, 6, number],
                params=params,
                stop_token_ids=[],
                seed=0,
                arrival_time=0.0,
            )
        )
    tokens: dict[int, list[int]] = {}
    errors: dict[int, str] = {}
    while core.has_work():
        for update in core.step():
            tokens.setdefault(update.id, []).extend(update.token_ids)
            if update.error is not None:
                errors[update.id] = update.error
    core.scheduler.pool.check([])
    return tokens, errors


@pytest.mark.parametrize(("owner", "name"), [(Shaper, "_rule"), (Penalties, "join")])
def test_rules_that_cannot_be_taken_up(
    model: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    want, errors = answers(model)
    assert not errors
    original = getattr(owner, name)

    def failing(self: Any, row: JoinedRow) -> Any:
        if row.request_id == VICTIM:
            raise ValueError("no such rule")
        return original(self, row)

    monkeypatch.setattr(owner, name, failing)
    got, errors = answers(model)
    assert list(errors) == [VICTIM] and "no such rule" in errors[VICTIM]
    assert {n: t for n, t in got.items() if n != VICTIM} == {
        n: t for n, t in want.items() if n != VICTIM
    }
