"""The guide's package, installed and used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dovetail.core.contracts.model import Linear
from dovetail.core.errors import CheckpointError
from dovetail.core.plugins.quant import make_scheme, quant_registry
from dovetail.core.request import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.docs.guides import install
from tests.engines import Answer, answer, make_core

ONE = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0)
PROMPTS = [[5, 6, 7], [30, 200, 9, 14, 77, 120], [250] * 20]


@pytest.fixture
def nibble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    install("writing-a-quant-scheme.md", tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return make_scheme("nibble", {})


def test_it_is_found_and_is_what_it_says(nibble: Any) -> None:
    assert quant_registry().entry("nibble").origin == "dovetail-nibble 0.1.0"
    w = np.random.default_rng(0).standard_normal((6, 128), np.float32)
    params = nibble.quantize(w)
    steps = np.abs(w.reshape(6, 2, 64)).max(2).repeat(64, axis=1) / 7
    assert (np.abs(nibble.reference(params) - w) <= 0.5001 * steps).all()
    layer = Linear(sources=("a", "b"), out_features=(4, 2), in_features=128)
    assert nibble.num_bytes(layer) == sum(array.nbytes for array in params.values())
    assert "multiple of 64" in nibble.refuses("layer", replace(layer, in_features=96))


def rewritten(model: Path, folder: Path, nibble: Any, *, stored: bool) -> Path:
    """The checkpoint in the scheme's format, or with the weights that the scheme's stand for."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    out: dict[str, np.ndarray] = {}
    for name, array in load_file(model / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            out[name] = array
        elif stored:
            params = nibble.quantize(array)
            out |= {f"{name}_packed": params["packed"], f"{name}_scales": params["scales"]}
        else:
            out[name] = nibble.reference(nibble.quantize(array))
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    if stored:
        config = json.loads((model / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "nibble"}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("platform", ["reference", "cpu"])
def test_answers_are_near_those_of_the_reference_weights(
    nibble: Any, platform: str, tmp_path: Path
) -> None:
    model = make_checkpoint("llama", tmp_path / "model", intermediate_size=128)
    plain = rewritten(model, tmp_path / "plain", nibble, stored=False)
    stored = rewritten(model, tmp_path / "stored", nibble, stored=True)
    want = answer(make_core(plain, platform), PROMPTS, ONE)
    while_loading = answer(make_core(model, platform, quantization="nibble"), PROMPTS)
    from_file = answer(make_core(stored, platform), PROMPTS)
    unquantized = answer(make_core(model, platform), PROMPTS, ONE)
    for a, b in zip(while_loading, from_file, strict=True):
        assert a.token_ids == b.token_ids and a.logprobs == b.logprobs
    assert distance(want, from_file) < 0.3 * distance(want, unquantized)


def distance(want: list[Answer], got: list[Answer]) -> float:
    """How far the first log-probabilities are from each other."""
    return sum(abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(want, got, strict=True))


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(nibble: Any, tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path / "model", intermediate_size=128)
    stored = rewritten(model, tmp_path / "stored", nibble, stored=True)
    tensors = load_file(stored / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight_scales"]
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight_scales"):
        make_core(stored, "cpu")
