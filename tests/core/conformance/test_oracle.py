"""The oracle against the transformers library, on its own checkpoints and on saved ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dovetail.core.conformance.checkpoints import FAMILIES, write_file
from dovetail.core.conformance.feature_checks import RULES, rule_wishes
from dovetail.core.conformance.oracle import Oracle, Wish
from dovetail.core.conformance.shelf import GREEDY, PROMPTS, Shelf
from dovetail.core.conformance.subject import Subject
from dovetail.core.errors import CheckpointError
from dovetail.core.models.registry import native_architectures
from dovetail.core.models.shard import DTYPES, Shard
from dovetail.core.plugins.selection import platform_registry
from tests.checkpoints import FAMILIES as SAVED
from tests.checkpoints import make_checkpoint
from tests.core.models.harness import model_of, random_tokens, transformers_logits


def test_every_native_family_is_there() -> None:
    named = [config["architectures"][0] for config in FAMILIES.values()]
    assert sorted(named) == native_architectures()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str, shelf: Shelf) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        shelf.checkpoint(family), attn_implementation="eager"
    ).eval()
    for prompt, told in zip(PROMPTS, shelf.greedy(family), strict=True):
        tokens = torch.tensor([[*prompt, *told.token_ids]])
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].numpy()
        # Each token is the likeliest behind those before it: so greedy decoding goes.
        assert len(told.token_ids) == GREEDY.max_tokens
        assert logits.argmax(-1).tolist() == told.token_ids
        assert np.abs(logits - np.stack(told.logits)).max() < 2e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_are_clear_and_answers_differ(family: str, shelf: Shelf) -> None:
    """Else a platform could fail by rounding, or pass by repeating itself."""
    told = shelf.greedy(family)
    assert min(answer.margins().min() for answer in told) > 2e-3
    assert min(len(set(answer.token_ids)) for answer in told) >= 8
    assert len({tuple(answer.token_ids) for answer in told}) == len(PROMPTS)


@pytest.mark.parametrize("family", SAVED)
def test_logits_of_saved_checkpoints(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    oracle = Oracle.open(path, model_of(path, 128))
    tokens = random_tokens(90)
    want = transformers_logits(path, tokens).numpy()
    assert np.abs(oracle.logits_of(tokens.tolist()) - want).max() < 2e-3


@pytest.mark.parametrize("name", RULES)
def test_rules_change_something(name: str, shelf: Shelf) -> None:
    subject = Subject(platform_registry({}).entry("reference"), shelf)
    greedy, drawn, plain = shelf.oracle("llama").tell(rule_wishes(subject, name))
    assert greedy.token_ids != plain.token_ids
    assert drawn.token_ids != greedy.token_ids


def test_a_window_and_a_cap_matter(shelf: Shelf) -> None:
    """The models whose windows the kit relies on look no further than those."""
    for family in ("mistral", "gemma2"):
        oracle = shelf.oracle(family)
        tokens = list(PROMPTS[3])
        changed = [(token + 7) % 300 + 3 for token in tokens[:8]] + tokens[8:]
        assert not np.allclose(oracle.logits_of(tokens)[20], oracle.logits_of(changed)[20])


def test_tokens_do_not_depend_on_who_else_is_there(shelf: Shelf) -> None:
    oracle = shelf.oracle("qwen3")
    wishes = [Wish(prompt=prompt, params=GREEDY) for prompt in PROMPTS[:3]]
    together = oracle.tell(wishes)
    for wish, told in zip(wishes, together, strict=True):
        assert oracle.tell([wish])[0].token_ids == told.token_ids


def test_files_are_read_back(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {
        code: random.integers(0, 2, (3, number)).astype(dtype)
        for number, (code, dtype) in enumerate(DTYPES.items())
    }
    write_file(tmp_path / "x.safetensors", tensors)
    shard = Shard(tmp_path / "x.safetensors")
    assert list(shard.entries) == list(tensors)
    for name, array in tensors.items():
        assert shard.tensor(name).dtype == array.dtype
        assert shard.tensor(name).tobytes() == array.tobytes()


def test_a_wrong_checkpoint_is_refused(tmp_path: Path, shelf: Shelf) -> None:
    folder = shelf.checkpoint("llama")
    shard = Shard(folder / "model.safetensors")
    kept = {name: shard.tensor(name) for name in shard.entries if name != "model.norm.weight"}
    (tmp_path / "config.json").write_text(json.dumps({}))
    write_file(tmp_path / "model.safetensors", kept)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        Oracle.open(tmp_path, shelf.model("llama"))
