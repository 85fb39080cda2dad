from __future__ import annotations

import pytest

from dovetail.core.contracts.model import Model
from dovetail.core.errors import PluginError
from dovetail.core.models.registry import GROUP, find_model, native_architectures
from dovetail.core.plugins import registry
from dovetail.core.plugins.entries import Entry


def offer(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Let the installed entry points be these, by package, all for the architecture ``Acme``."""
    entries = [
        Entry(group=GROUP, name="Acme", value=value, distribution=package, version="1.2.3")
        for package, value in values.items()
    ]
    monkeypatch.setattr(registry, "installed_entries", lambda: entries)


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
    offer(monkeypatch, acme="no.such.module:Model")
    with pytest.raises(PluginError, match=r"'Acme' \(acme 1\.2\.3, .*ModuleNotFoundError"):
        find_model(["Acme"])


def test_a_plug_in_that_is_not_a_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, acme="json:loads")
    with pytest.raises(PluginError, match=r"acme 1\.2\.3, json:loads.*inherits from Model"):
        find_model(["Acme"])


def test_two_offers_are_an_error_until_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, dovetail="dovetail.core.models.llama:Llama", rival="b:B")
    with pytest.raises(PluginError, match=r"offered by dovetail 1\.2\.3 and rival 1\.2\.3"):
        find_model(["Acme"])
    monkeypatch.setenv("DOVETAIL_PLUGINS", "")
    found = find_model(["Acme"])
    assert found is not None
    assert found.__name__ == "Llama"
