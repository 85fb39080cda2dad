from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from dovetail.core.contracts.model import Model
from dovetail.core.errors import PluginError
from dovetail.core.models import registry
from dovetail.core.models.registry import GROUP, find_model, native_architectures


class Distribution:
    name = "acme-models"
    version = "1.2.3"


def offer(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    """Let the installed entry points be these, all for the architecture ``Acme``."""
    entries = [EntryPoint("Acme", value, GROUP)._for(Distribution()) for value in values]

    def entry_points(*, group: str, name: str = "Acme") -> list[Any]:
        return [entry for entry in entries if entry.group == group and entry.name == name]

    monkeypatch.setattr(registry, "entry_points", entry_points)


def test_every_native_architecture_is_a_model() -> None:
    names = native_architectures()
    assert {
        "GPT2LMHeadModel",
        "Gemma2ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "OPTForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    } <= set(names)
    assert names == sorted(names)
    for name in names:
        found = find_model([name])
        assert found is not None
        assert issubclass(found, Model)


def test_the_first_that_is_offered() -> None:
    found = find_model(["SomethingElse", "OPTForCausalLM", "LlamaForCausalLM"])
    assert found is not None
    assert found.__name__ == "Opt"
    assert find_model(["SomethingElse"]) is None
    assert find_model([]) is None


def test_a_plug_in_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "no.such.module:Model")
    with pytest.raises(PluginError, match=r"acme-models 1\.2\.3.*Acme.*ModuleNotFoundError"):
        find_model(["Acme"])


def test_a_plug_in_that_is_not_a_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "json:loads")
    with pytest.raises(PluginError, match=r"acme-models 1\.2\.3.*json:loads.*subclass"):
        find_model(["Acme"])


def test_two_offers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "a:A", "b:B")
    with pytest.raises(PluginError, match="more than once: a:A of acme-models"):
        find_model(["Acme"])
