"""``dovetail plan`` as users type it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dovetail.core.cli import main
from dovetail.core.cli import plan as command
from dovetail.core.config import locate
from dovetail.core.config.schema import EngineConfig
from dovetail.core.errors import CheckpointError

NULL = ("--device", "null")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that is nothing but its config."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder_that_holds_only_a_config(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(folder), "--load-format", "dummy", "--device", "reference"]
    assert main([*words, "--memory", "1g", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64
    rotary = found["memory"]["weights"] - 4 * (2 * layer + 2 * 512 * 64 + 64)
    assert 0 <= rotary <= 4096 * 16 * 2 * 4, "what is left are the tables of the rotary embedding"
    assert found["kv_cache"]["bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert found["memory"]["free"] == 10**9
    assert found["choices"]["attention"].startswith("reference (first in the platform's order")
    assert "sdpa: not needed" in found["choices"]["attention"]


def test_it_does_not_fit_and_says_what_would(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(folder), "--load-format", "dummy", "--device", "reference"]
    assert main([*words, "--memory", "9m", "--max-model-len", "4096"]) == 1
    shown = capsys.readouterr()
    assert "It does not fit: " in shown.out
    (length,) = {
        line.split("--max-model-len ")[1].split()[0]
        for line in shown.out.splitlines()
        if "It would fit: --max-model-len" in line
    }
    assert "\x1b" not in shown.out, "no colours where there is no terminal"
    assert main([*words, "--memory", "9m", "--max-model-len", length]) == 0
    assert main([*words, "--memory", "9m", "--max-model-len", str(int(length) + 640)]) == 1


def test_the_bundled_model_and_the_reason_for_the_device(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", *NULL]) == 0
    shown = capsys.readouterr()
    assert shown.err == "device null (named by --device)\n"
    assert "It fits: " in shown.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such/folder/at/all", *NULL], "model folder not found"),
        (["a", "--model", "b", *NULL], "two models: a and --model b"),
        (["--memory", "lots", *NULL], "--memory: must be a number of bytes"),
        (["--typical-len", "0", *NULL], "--typical-len: must be"),
        (["--device", "reference", "--attention-backend", "x"], "no attention backend 'x' here"),
        (["--device", "reference", "--model-impl", "transformers"], "Plans are for native models"),
        (["--device", "nul"], "There is no platform 'nul'; known: null"),
    ],
)
def test_what_cannot_be_planned(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) in (1, 2)
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_a_model_on_the_hub_is_planned_without_its_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def fetch(model: str, *, tokenizer_only: bool = False) -> Path:
        asked.append((model, tokenizer_only))
        return folder

    monkeypatch.setattr(locate, "fetch", fetch)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "nothing"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert main(["plan", "acme/model", *NULL]) == 0
    assert asked == [("acme/model", True)]
    assert "the weights stay on the hub" in capsys.readouterr().err


def test_without_the_network_there_is_nothing_to_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError):
        command._without_weights(EngineConfig(model="acme/model-that-is-nowhere"))
