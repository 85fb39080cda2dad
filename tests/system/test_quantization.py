"""Quantized models through the whole engine: what the scheme's reference weights would say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dovetail.core.errors import UnsupportedError
from dovetail.quant.int8 import Int8
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core

PROMPTS = [[5, 6, 7], [30, 200, 9, 14, 77, 120], [250] * 20]


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def dequantized(model: Path, folder: Path) -> Path:
    """The same checkpoint, each linear weight replaced by what int8 makes of it."""
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    transposed = json.loads((model / "config.json").read_text())["model_type"] == "gpt2"
    for name, array in tensors.items():
        embeds = any(part in name for part in ("embed", "wte", "wpe"))
        if array.ndim == 2 and not embeds:
            w = array.T if transposed else array
            back = Int8({}).reference(Int8({}).quantize(w))
            tensors[name] = np.ascontiguousarray(back.T if transposed else back)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("platform", ["reference", "cpu"])
def test_int8_says_what_its_reference_weights_say(
    model: Path, platform: str, tmp_path: Path
) -> None:
    quantized = make_core(model, platform, quantization="int8")
    plain = make_core(dequantized(model, tmp_path), platform)
    got, want = answer(quantized, PROMPTS), answer(plain, PROMPTS)
    tied = json.loads((model / "config.json").read_text()).get("tie_word_embeddings")
    for a, b in zip(got, want, strict=True):
        if not tied:  # A tied output layer is quantized, the embedding is not.
            assert a.token_ids == b.token_ids
            assert np.allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert len(a.token_ids) == len(b.token_ids)


def test_it_is_not_the_unquantized_model(model: Path) -> None:
    plain = answer(make_core(model, "cpu"), PROMPTS)
    quantized = answer(make_core(model, "cpu", quantization="int8"), PROMPTS)
    worst = max(abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(plain, quantized, strict=True))
    assert 1e-4 < worst < 1.0


def test_the_librarys_models_are_not_quantized(model: Path) -> None:
    with pytest.raises(UnsupportedError, match="only native models are quantized"):
        make_core(model, "cpu", quantization="int8", model_impl="transformers")
