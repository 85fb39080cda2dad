"""What a request leaves in its KV blocks reaches none of those that have them next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dovetail.core.request import Request, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core

BAD = 7
"""A token whose embedding is no number, and so are its keys and values."""
SETTINGS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 40,
    "max_model_len": 128,
    "block_size": 16,
    "num_gpu_blocks_override": 9,
    "enable_prefix_caching": False,
}
PROMPTS = [[20 + (5 * i + j) % 60 for j in range(n)] for i, n in enumerate((3, 19, 33))]
PARAMS = SamplingParams(temperature=0.0, max_tokens=12)


def with_a_bad_token(folder: Path) -> Path:
    model = make_checkpoint("llama", folder, tie_word_embeddings=False)
    (file,) = model.glob("*.safetensors")
    weights = load_file(file)
    weights["model.embed_tokens.weight"][BAD] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("platform", "backend", "more"),
    [
        ("reference", "reference", {}),
        ("reference", "sdpa", {}),
        ("reference", "sdpa", {"kv_cache_dtype": "fp8_e5m2"}),
        ("reference", "invariant", {}),
        ("cpu", "invariant", {"deterministic": True}),
        ("cpu", "sdpa", {}),
        ("cpu", "auto", {"dtype": "bfloat16"}),
    ],
)
def test_blocks_of_an_abandoned_request(
    platform: str, backend: str, more: dict[str, Any], tmp_path: Path
) -> None:
    """It is given up before its logits show what it is, so nobody cleans its blocks."""
    model = with_a_bad_token(tmp_path)
    settings = {**SETTINGS, "attention_backend": backend, **more}

    def tokens(core: Any) -> list[list[int]]:
        return [each.token_ids for each in answer(core, PROMPTS, PARAMS)]

    want = tokens(make_core(model, platform, **settings))
    core = make_core(model, platform, **settings)
    core.add(
        Request(
            id=99,
            prompt_token_ids=[BAD] * 110,
            params=PARAMS,
            stop_token_ids=[],
            seed=0,
            arrival_time=0.0,
        )
    )
    for _ in range(2):
        assert core.step() == []
    core.abort([99])
    assert tokens(core) == want
