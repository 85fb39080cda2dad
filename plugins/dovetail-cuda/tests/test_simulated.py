"""The whole plug-in on the host, kernels interpreted, says what the reference platform says.

Short, for a step takes half a second; ``make certify`` runs the kit, with 64 tokens of each family.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dovetail.core.engine.core import EngineCore
from dovetail.core.errors import ConfigError
from dovetail.core.request import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core
from tests.thorough import every

SMALL: dict[str, Any] = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "max_model_len": 64,
    "gpu_memory_utilization": 0.3,
}
PROMPTS = [[5, 6, 7], [9, 8] * 10]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=5),
    SamplingParams(temperature=0.9, top_p=0.9, min_p=0.01, max_tokens=4),
]
DIFFERENT = ("qwen3", "gemma2", "phi3", "gpt2")
"""Norms of heads; caps and windows; a rotated part of each head; no rotation."""

pytestmark = pytest.mark.skipif(
    os.environ.get("DOVETAIL_CUDA_SIMULATE") != "1",
    reason="a GPU is there, or nobody asked for one: DOVETAIL_CUDA_SIMULATE=1 simulates it",
)


def tokens(core: EngineCore) -> list[list[int]]:
    return [each.token_ids for each in answer(core, PROMPTS, PARAMS, seeds=[3, 4])]


@pytest.mark.parametrize("family", every(3, DIFFERENT))
def test_tokens_are_those_of_the_reference(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path)
    core = make_core(model, "cuda", **SMALL)
    described = core.runner.describe()
    assert described["attention"].startswith("triton")
    assert "up to 2 rows" in described["recorded"]
    assert tokens(core) == tokens(make_core(model, "reference", **SMALL))
    core.close()


def test_without_graphs_it_says_the_same(tmp_path: Path) -> None:
    model = make_checkpoint("qwen3", tmp_path)
    core = make_core(model, "cuda", options={"graphs": "off"}, **SMALL)
    assert core.runner.describe()["recorded"] == "none: option graphs is off"
    assert tokens(core) == tokens(make_core(model, "reference", **SMALL))


def test_options_are_checked(tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match="graphs is 'maybe': say"):
        make_core(model, "cuda", options={"graphs": "maybe"}, **SMALL)
    with pytest.raises(ConfigError, match="no option 'grpahs'; it has: graphs"):
        make_core(model, "cuda", options={"grpahs": "on"}, **SMALL)
