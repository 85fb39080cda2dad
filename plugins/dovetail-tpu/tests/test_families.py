"""Families unlike each other through the whole engine, whatever the path; the kit has them all."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint
from tests.engines import Answer, answer, make_core
from tests.thorough import every

FAMILIES = ["mistral", "gemma2", "opt"]
OVERRIDES: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 32}}
LENGTHS = (1, 3, 7, 16, 33, 64, 100, 150)
NUM_BLOCKS = {"mistral": 10}
"""So few that not all fit; with a window, rows give blocks back."""
SMALL: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
    "max_model_len": 224,
    "block_size": 32,
}
"""One shape for decode and one for chunks of prompts."""


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 250) for _ in range(length)] for length in LENGTHS]


def check(found: list[Answer], wanted: list[Answer]) -> None:
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted]
    pairs = zip(found, wanted, strict=True)
    differences = [
        abs(x - y) for a, b in pairs for x, y in zip(a.logprobs, b.logprobs, strict=True)
    ]
    assert max(differences) < 1e-4


@pytest.mark.parametrize("family", every(3, FAMILIES))
def test_64_tokens_equal_the_reference(family: str, tmp_path: Any) -> None:
    path = make_checkpoint(family, tmp_path, **OVERRIDES.get(family, {}))
    num_blocks = NUM_BLOCKS.get(family, 20)
    core = make_core(path, "tpu", num_gpu_blocks_override=num_blocks, **SMALL)
    assert core.steps_ahead == 1
    reference = make_core(path, "reference")
    wanted = answer(reference, prompts())
    assert len({tuple(a.token_ids) for a in wanted}) > 4, "it says the same to everybody"
    check(answer(core, prompts()), wanted)
    assert core.scheduler.stats.num_preemptions > 0
    hits = core.scheduler.stats.prefix_cache_hits
    check(answer(core, prompts()[-2:], first_id=100), wanted[-2:])
    assert core.scheduler.stats.prefix_cache_hits > hits
