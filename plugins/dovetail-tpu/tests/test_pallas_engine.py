"""The kernels, interpreted, under the whole engine: the reference's tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core
from tests.thorough import every

LENGTHS = (1, 7, 33, 90)


@pytest.mark.parametrize(("family", "num_devices"), every(2, [("gemma2", 1), ("llama", 2)]))
def test_tokens_equal_the_reference(family: str, num_devices: int, tmp_path: Any) -> None:
    """Gemma 2 has windows in every other layer and a soft cap; two devices share the heads."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 250) for _ in range(length)] for length in LENGTHS]
    path = make_checkpoint(family, tmp_path)
    core = make_core(
        path,
        "tpu",
        attention_backend="pallas",
        tensor_parallel_size=num_devices,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_model_len=160,
        block_size=16,
    )
    wanted = [a.token_ids for a in answer(make_core(path, "reference"), prompts)]
    assert [a.token_ids for a in answer(core, prompts)] == wanted
