"""The guide's backend, installed, compared and served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.attention_backends.reference import ReferenceAttention
from dovetail.core.plugins.selection import load_platform
from tests.attention_backends.sequences import Sequences, make_need, make_spec
from tests.checkpoints import make_checkpoint
from tests.docs.guides import install
from tests.engines import answer, make_core

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [30, 200, 9, 14, 77, 120], [250] * 40]


@pytest.fixture
def flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    install("writing-an-attention-backend.md", tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return next(b for b in load_platform("cpu").attention_backends() if b.name == "flat")


@pytest.mark.parametrize("more", [{}, {"window": 20}, {"soft_cap": 2.0}, {"kv_heads": 1}])
def test_its_values_are_those_of_the_reference(flat: Any, more: dict[str, Any]) -> None:
    spec = make_spec(**more)
    work = Sequences(spec, make_need(spec), (1, 5, 16, 17, 60))
    want = work.run(ReferenceAttention(CPU), work.whole())
    for steps in (work.whole(), work.one_by_one(), work.mixed()):
        for a, b in zip(work.run(flat, steps), want, strict=True):
            assert torch.allclose(a, b, atol=3e-6)


def test_it_refuses_what_it_lacks(flat: Any) -> None:
    assert flat.refuses(make_need(make_spec())) is None
    assert "ALiBi" in flat.refuses(make_need(make_spec(alibi_slopes=(0.5, 0.25, 0.125, 0.0625))))
    assert "int8" in flat.refuses(make_need(make_spec(), kv_dtype="int8"))
    assert flat.refuses(make_need(make_spec(), deterministic=True))


def test_a_model_is_served_with_it_and_says_the_same(flat: Any, tmp_path: Path) -> None:
    model = make_checkpoint("gemma2", tmp_path / "model")
    core = make_core(model, "cpu", attention_backend="flat", block_size=16)
    assert core.runner.describe()["attention"].startswith("flat (named by the user)")
    want = answer(make_core(model, "reference"), PROMPTS)
    assert [a.token_ids for a in answer(core, PROMPTS)] == [a.token_ids for a in want]
