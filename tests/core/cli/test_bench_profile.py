"""Profiles of the bundled model."""

import json
from xml.etree import ElementTree

import pytest

from dovetail.core.cli import main
from dovetail.core.contracts.platform import Rates
from dovetail.platforms.torch.platform import TorchPlatform

SMALL = ["--max-model-len", "256", "--max-num-batched-tokens", "128"]
PROFILE = ["bench", "profile", *SMALL, "--input-len", "20", "--num-steps", "5", "--num-iters", "2"]
LAYERS = 4
"""Of the bundled model."""


@pytest.fixture
def rates(monkeypatch):
    found = Rates(read_bytes_per_second=1e9, matrix_flops_per_second=1e12)
    monkeypatch.setattr(TorchPlatform, "rates", lambda self, dtype: found)
    return found


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("quantization", [[], ["--quantization", "int8"]], ids=["plain", "int8"])
def test_profile(rates, tmp_path, capsys, device, quantization):
    file, picture = tmp_path / "p.json", tmp_path / "new" / "p.svg"
    words = ["--device", device, "--batch-size", "3", "--json", str(file), "--plot", str(picture)]
    assert main([*PROFILE, *words, *quantization]) == 0
    result = json.loads(file.read_text())
    assert (result["platform"], result["dtype"]) == (device, "bfloat16")
    assert result["rates"] == {"read_bytes_per_second": 1e9, "matrix_flops_per_second": 1e12}
    assert [phase["phase"] for phase in result["phases"]] == ["prefill", "decode"]
    for phase in result["phases"]:
        parts = {part["name"]: part for part in phase["classes"]}
        calls = {name: part["calls"] for name, part in parts.items() if part["calls"]}
        # Where the first layer of the MLP is fused with its activation, that has no class.
        assert calls.pop("activations", LAYERS) == LAYERS
        assert calls == {
            **dict.fromkeys(("qkv", "out", "gate_up", "down", "attention"), LAYERS),
            "norms": 2 * LAYERS + 1,
            "lm_head": 1,
            "sampling": 1,
            "embedding and rotary": 3,
        }
        seconds = [part["seconds"] for part in parts.values()]
        assert min(seconds) > 0
        assert sum(seconds) == pytest.approx(phase["seconds"])
        assert phase["seconds"] == pytest.approx(phase["watched_seconds_median"], rel=0.5)
        assert phase["steps_each"] == 1
    prefill, decode = (phase["num_measured"] for phase in result["phases"])
    assert (prefill, decode) == (2, 5)
    # Of the 9.7 MB in two bytes each, 2.1 MB are the embedding's.
    bound = result["phases"][1]["roofline_seconds"] * 1e9
    assert 7.5e6 < bound < 8.0e6 if not quantization else 3.8e6 < bound < 5.2e6
    assert "decode, 3 requests of 20 tokens each" in capsys.readouterr().out
    assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")


def test_prompts_that_are_cut_up(rates, tmp_path):
    file = tmp_path / "p.json"
    words = ["--device", "reference", "--phase", "prefill", "--batch-size", "8"]
    assert main([*PROFILE, *words, "--input-len", "40", "--json", str(file)]) == 0
    (phase,) = json.loads(file.read_text())["phases"]
    assert phase["steps_each"] == 3
    calls = {part["name"]: part["calls"] for part in phase["classes"]}
    assert calls["qkv"] == 3 * LAYERS


def test_without_a_roofline(capsys):
    words = ["--device", "reference", "--phase", "decode", "--no-roofline"]
    assert main([*PROFILE, *words]) == 0
    shown = capsys.readouterr().out
    assert "gate_up" in shown
    assert "Roofline" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "null"], "platform null cannot be looked into"),
        (["--device", "oracle"], "platform oracle cannot be looked into"),
        (["--device", "reference", "--model-impl", "transformers"], "calls no ops that could be"),
        (["--device", "reference", "--input-len", "250"], "they may have 256 each"),
        (["--device", "reference", "--batch-size", "4", "--max-num-seqs", "2"], "--max-num-seqs"),
        (["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
         "leave --speculative-config out"),
        (["--phase", "both-ways"], "invalid choice"),
    ],
)  # fmt: skip
def test_wrong_wishes(capsys, words, message):
    assert main([*PROFILE, *words]) in (1, 2)
    assert message in capsys.readouterr().err
