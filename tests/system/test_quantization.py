"""Quantized models through the whole engine: what the oracle says of them, and what they lose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.perplexity import perplexity, read_texts
from dovetail.core.conformance.oracle import Oracle
from dovetail.core.conformance.sampler import log_softmax
from dovetail.core.demo import demo_model_path
from dovetail.core.errors import UnsupportedError
from dovetail.core.models.registry import find_model
from dovetail.core.plugins.quant import make_scheme
from tests.checkpoints import make_checkpoint
from tests.engines import Answer, answer, make_core

PROMPTS = [[5, 6, 7], [30, 200, 9, 14, 77, 120], [250] * 20]
SCHEMES = ["int8", "int4"]


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def oracle(model: Path, scheme: str | None) -> Oracle:
    config = json.loads((model / "config.json").read_text())
    family = find_model(config["architectures"])
    assert family is not None
    quantizes = make_scheme(scheme, {}) if scheme else None
    definition = family.from_config(config, max_model_len=512)
    return Oracle.open(model, definition, scheme=quantizes)


def errors(judge: Oracle, got: Sequence[Answer]) -> np.ndarray:
    """How far each token's log-probability is from what the oracle says of it."""
    found = []
    for prompt, told in zip(PROMPTS, got, strict=True):
        known = log_softmax(judge.logits_of([*prompt, *told.token_ids[:-1]]))
        places = np.arange(len(told.token_ids)) + len(prompt) - 1
        found.append(np.abs(known[places, told.token_ids] - told.logprobs))
    return np.concatenate(found)


@pytest.mark.parametrize("platform", ["reference", "cpu"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_model_says_what_the_oracle_says(
    model: Path, scheme: str, platform: str
) -> None:
    got = answer(make_core(model, platform, quantization=scheme), PROMPTS)
    off = errors(oracle(model, scheme), got)
    assert np.median(off) < 2e-3 and off.max() < 0.1
    assert np.median(errors(oracle(model, None), got)) > 0.01, "nothing was quantized"


def test_the_librarys_models_are_not_quantized(model: Path) -> None:
    with pytest.raises(UnsupportedError, match="only native models are quantized"):
        make_core(model, "cpu", quantization="int8", model_impl="transformers")


def test_what_quantizing_costs_in_perplexity() -> None:
    """Seen: 0.1 % for int8, 1.0 % for int4."""
    here, demo = Path(__file__).parents[1], demo_model_path()
    files = [here / name for name in ("engines.py", "checkpoints.py", "test_architecture.py")]
    texts = read_texts(demo, files, 1024)
    plain = perplexity(demo, texts, None, "cpu", "float32")
    cost = {name: perplexity(demo, texts, name, "cpu", "float32") / plain - 1 for name in SCHEMES}
    assert abs(cost["int8"]) < 0.01
    assert abs(cost["int8"]) < cost["int4"] < 0.03
