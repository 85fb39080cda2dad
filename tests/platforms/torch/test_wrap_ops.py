"""Runners whose ops go through somebody's hands for a while."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.core.contracts.observation import SAMPLING, ObservableRunner
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core
from tests.platforms.torch.recordable import make_staged

SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 160}
PROMPTS = [[5, 6, 7], [9] * 30]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
DRAWN = SamplingParams(temperature=0.9, max_tokens=12, logprobs=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def tokens(core: EngineCore, params: SamplingParams, first_id: int) -> list[list[int]]:
    return [each.token_ids for each in answer(core, PROMPTS, params, first_id=first_id)]


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("make", ["direct", "staged"])
def test_tokens_are_the_same_and_every_step_is_seen(
    llama: Path, make: str, params: SamplingParams
) -> None:
    staged = make == "staged"
    core = make_staged(llama, **SMALL) if staged else make_core(llama, "reference", **SMALL)
    runner: Any = core.runner
    assert isinstance(runner, ObservableRunner)
    calls: Counter[str] = Counter()

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **more: Any) -> Any:
            calls[name] += 1
            return function(*args, **more)

        return called

    plain = tokens(core, params, 1)
    with runner.wrap_ops(wrap) as view:
        assert tokens(core, params, 101) == plain
    assert set(view.parameters.values()) >= {"layers.0.mlp.down", "lm_head", "norm"}
    steps = calls[SAMPLING]
    assert steps >= 12
    assert calls["rotary_attention"] == calls["attention"] == 2 * steps
    assert calls["linear"] == (2 * 4 + 1) * steps
    assert tokens(core, params, 201) == plain
    assert calls[SAMPLING] == steps


def test_ops_are_as_they_were_after_an_error(llama: Path) -> None:
    core = make_core(llama, "reference", **SMALL)
    runner: Any = core.runner
    before = dict(vars(runner._loaded.model._ops)), runner._steps.sample
    with pytest.raises(KeyError), runner.wrap_ops(lambda name, function: None):
        raise KeyError
    assert (dict(vars(runner._loaded.model._ops)), runner._steps.sample) == before


def test_bytes_are_those_of_the_numbers(llama: Path) -> None:
    runner: Any = make_core(llama, "reference", **SMALL).runner
    with runner.wrap_ops(lambda name, function: function) as view:
        whole = torch.zeros(6, 8, dtype=torch.bfloat16)
        assert view.num_bytes(whole[:2]) == 2 * 8 * 2
        assert view.num_bytes((whole, [whole[0]], 5, None)) == (6 * 8 + 8) * 2
