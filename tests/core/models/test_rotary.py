"""Rotary tables against the transformers library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dovetail.core.errors import CheckpointError, UnsupportedError
from dovetail.core.models.rotary import ROPE_TYPES, Rotary
from dovetail.core.models.settings import Settings

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "beta_fast": 20,
        "beta_slow": 2,
        "truncate": False,
        "original_max_position_embeddings": 512,
    },
    "yarn factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 1.3,
        "original_max_position_embeddings": 1024,
    },
    "longrope": {
        "short_factor": [1.0 + i / 9 for i in range(32)],
        "long_factor": [1.0 + i for i in range(32)],
        "original_max_position_embeddings": 1024,
    },
    "longrope factor": {
        "rope_type": "longrope",
        "factor": 3.0,
        "short_factor": [1.0] * 32,
        "long_factor": [2.0] * 32,
        "original_max_position_embeddings": 1024,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}
MAX = 4096


def config(rope: dict[str, Any], base: float = 10000.0, head: int = 64) -> dict[str, Any]:
    return {
        "hidden_size": 4 * head,
        "num_attention_heads": 4,
        "head_dim": head,
        "max_position_embeddings": MAX,
        "rope_parameters": {"rope_theta": base, **rope},
    }


def rotary(values: dict[str, Any], max_model_len: int = MAX, head: int = 64) -> Rotary:
    return Rotary.from_config(Settings(values, "test"), head_size=head, max_model_len=max_model_len)


def theirs(values: dict[str, Any], length: int | None = None) -> tuple[np.ndarray, float]:
    """Frequencies (F,) and attention factor of the transformers library."""
    llama = LlamaConfig(**values)
    kind = llama.rope_parameters["rope_type"]
    if kind == "default":
        frequencies, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(llama)
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](llama, seq_len=length)
    return frequencies.numpy(), factor


def with_type(name: str) -> dict[str, Any]:
    return {"rope_type": name, **ROPES[name]}


@pytest.mark.parametrize("base", [10000.0, 500000.0, 1234567.0])
@pytest.mark.parametrize("name", [name for name in ROPES if name != "dynamic"])
def test_frequencies_and_factors(name: str, base: float) -> None:
    values = config(with_type(name), base)
    expected, factor = theirs(values, length=MAX)
    ours = rotary(values)
    assert ours.frequencies.dtype == np.float32
    # One unit in the last place: torch's own power is not the same on every machine.
    np.testing.assert_allclose(ours.frequencies, expected, rtol=2.5e-7)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("name", list(ROPES))
def test_tables(name: str) -> None:
    values = config(with_type(name))
    ours = rotary(values)
    frequencies, factor = theirs(values, length=MAX)
    angles = torch.arange(MAX)[:, None].float() * torch.from_numpy(frequencies)
    assert ours.cos().shape == ours.sin().shape == (MAX, 32)
    assert ours.cos().dtype == ours.sin().dtype == np.float32
    np.testing.assert_allclose(ours.cos(), (angles.cos() * factor).numpy(), atol=3e-4)
    np.testing.assert_allclose(ours.sin(), (angles.sin() * factor).numpy(), atol=3e-4)


def test_default_tables_are_those_of_transformers_to_the_last_bits() -> None:
    values = config({}, base=500000.0, head=128)
    frequencies, _ = theirs(values)
    ours = rotary(values, head=128)
    np.testing.assert_array_equal(ours.frequencies, frequencies)
    angles = torch.arange(MAX)[:, None].float() * torch.from_numpy(frequencies)
    np.testing.assert_allclose(ours.cos(), angles.cos().numpy(), atol=2e-7)


def test_dynamic_is_a_function_of_the_position() -> None:
    values = config(with_type("dynamic"))
    ours = rotary(values, max_model_len=2 * MAX)
    for position in (0, 5, MAX - 1, MAX, MAX + 1, 2 * MAX - 1):
        expected, _ = theirs(values, length=position + 1)
        np.testing.assert_allclose(ours.frequencies[position], expected, rtol=3e-7)
    np.testing.assert_array_equal(rotary(values).cos(), ours.cos()[:MAX])


def test_longrope_goes_by_the_longest_sequence_that_may_come() -> None:
    values = config(with_type("longrope"))
    short, _ = theirs(values)
    long, _ = theirs(values, length=1025)
    np.testing.assert_allclose(rotary(values, 1024).frequencies, short, rtol=2.5e-7)
    np.testing.assert_allclose(rotary(values, 1025).frequencies, long, rtol=2.5e-7)


def test_the_original_context_outside_the_rope_parameters_comes_first() -> None:
    values = {**config(with_type("longrope")), "original_max_position_embeddings": 2048}
    expected, factor = theirs(values)
    ours = rotary(values, 2048)
    np.testing.assert_allclose(ours.frequencies, expected, rtol=2.5e-7)
    assert ours.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize("name", [name for name in ROPES if " " not in name])
def test_the_old_form(name: str) -> None:
    new = config(with_type(name), base=50000.0)
    old = {**new, "rope_theta": 50000.0, "rope_scaling": {"type": name, **ROPES[name]}}
    del old["rope_parameters"]
    np.testing.assert_array_equal(rotary(new).cos(), rotary(old).cos())


def test_su_and_the_first_yarn_of_phi3_are_longrope() -> None:
    wanted = rotary(config(with_type("longrope"))).cos()
    for name in ("su", "yarn"):
        given = config({"rope_type": name, **ROPES["longrope"]})
        np.testing.assert_array_equal(rotary(given).cos(), wanted)


@pytest.mark.parametrize("where", ["rope_parameters", "top"])
def test_a_part_of_the_head(where: str) -> None:
    values = config({})
    if where == "top":
        values["partial_rotary_factor"] = 0.25
    else:
        values["rope_parameters"]["partial_rotary_factor"] = 0.25
    expected = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(rotary(values).frequencies, expected, rtol=1e-6)


def test_no_rope_settings_at_all() -> None:
    values = {"max_position_embeddings": MAX}
    np.testing.assert_array_equal(rotary(values).cos(), rotary(config({})).cos())


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'helix'") as caught:
        rotary(config({"rope_type": "helix"}))
    assert all(name in str(caught.value) for name in ROPE_TYPES)


def test_parameters_per_layer_type_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="per layer type"):
        rotary(config({"full_attention": {"rope_type": "default"}}))


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear"}, "lacks 'factor'"),
        ({"rope_type": "linear", "factor": -1}, "a number above 0"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "'long_factor'|'short_factor'"),
        ({"rope_type": "llama3", "factor": 8.0}, "lacks 'low_freq_factor'"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            "must be greater",
        ),
        ({"partial_rotary_factor": 0.01}, "an even number"),
    ],
)
def test_wrong_parameters(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        rotary(config(rope))
