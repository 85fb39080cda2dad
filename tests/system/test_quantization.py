"""Quantized models through the whole engine: what the oracle says of them, and what they lose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from dovetail.core.conformance.oracle import Oracle
from dovetail.core.conformance.sampler import log_softmax
from dovetail.core.demo import demo_model_path
from dovetail.core.errors import UnsupportedError
from dovetail.core.models.registry import find_model
from dovetail.core.plugins.quant import make_scheme
from dovetail.core.request import SamplingParams
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


def perplexity(texts: Sequence[Sequence[int]], scheme: str | None) -> float:
    """Of the demonstration model, in float32."""
    core = make_core(demo_model_path(), "cpu", quantization=scheme)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    told = answer(core, texts, params)
    logprobs = [
        place.logprobs[0] for a in told for u in a.updates for place in u.prompt_logprobs or ()
    ]
    assert len(logprobs) == sum(len(text) - 1 for text in texts)
    return float(np.exp(-np.mean(logprobs)))


def test_what_quantizing_costs_in_perplexity() -> None:
    """Seen: 0.1 % for int8, 1.0 % for int4."""
    tokenizer = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))
    here = Path(__file__).parents[1]
    files = [here / name for name in ("engines.py", "checkpoints.py", "test_architecture.py")]
    texts = [tokenizer.encode(file.read_text(encoding="utf-8")).ids[:1024] for file in files]
    plain = perplexity(texts, None)
    cost = {scheme: perplexity(texts, scheme) / plain - 1 for scheme in SCHEMES}
    assert abs(cost["int8"]) < 0.01
    assert abs(cost["int8"]) < cost["int4"] < 0.03
