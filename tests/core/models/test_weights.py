from __future__ import annotations

import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dovetail.core.contracts.model import Constant, Linear, Tensor
from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.errors import CheckpointError, UnsupportedError
from dovetail.core.models.load import Unread, read_weights
from dovetail.core.models.shard import Shard
from dovetail.core.models.weights import (
    Dummy,
    Leaf,
    Parts,
    align,
    assemble,
    check,
    fill,
    leaves,
    needs,
    open_checkpoint,
)
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.core.models.harness import (
    config_of,
    logits_of,
    model_of,
    our_logits,
    random_tokens,
    transformers_logits,
)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_checkpoint("llama", tmp_path / "llama")


# Declarations


def test_leaves_and_fill() -> None:
    norm = Tensor(source="norm", shape=(4,))
    table = Constant(make=lambda: np.zeros(1, np.float32))
    tree = {"layers": [{"norm": norm}, {"norm": norm, "none": {}}], "table": table}
    assert list(leaves(tree)) == [
        ("layers.0.norm", norm),
        ("layers.1.norm", norm),
        ("table", table),
    ]
    bound = {path: path for path, _ in leaves(tree)}
    assert fill(tree, bound) == {
        "layers": [{"norm": "layers.0.norm"}, {"norm": "layers.1.norm", "none": {}}],
        "table": "table",
    }


def test_assemble(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3, 2) for name in ("a", "b")} | {"bias": torch.randn(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_checkpoint(tmp_path)
    two = Linear(sources=("a", "b"), out_features=(3, 3), in_features=2)
    a, b = assemble(two, source).weights
    assert np.shares_memory(a, source.tensor("a"))
    assert np.shares_memory(b, source.tensor("b"))

    across = Linear(
        sources=("a",),
        bias_sources=("bias",),
        out_features=(2,),
        in_features=3,
        transposed=True,
    )
    parts = assemble(across, source)
    assert parts.weights[0].shape == (2, 3)
    assert np.shares_memory(parts.weights[0], source.tensor("a"))
    assert parts.biases[0].shape == (3,)
    assert parts.num_bytes == 6 * 4 + 3 * 4

    offset = assemble(Tensor(source="bias", shape=(3,), offset=1.0), source).weights[0]
    np.testing.assert_array_equal(offset, tensors["bias"].numpy() + 1)
    constant = assemble(Constant(make=lambda: np.ones(2, np.float32)), source)
    np.testing.assert_array_equal(constant.weights[0], [1, 1])


def test_an_offset_is_added_in_float32(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1e-3]).bfloat16()}, tmp_path / "model.safetensors")
    leaf = Tensor(source="w", shape=(1,), offset=1.0)
    (array,) = assemble(leaf, open_checkpoint(tmp_path)).weights
    assert array.dtype == np.float32
    assert array[0] == pytest.approx(1.001, abs=1e-5)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_checkpoints_of_every_family_are_complete(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path, max_shard_size="60KB")
    model = model_of(path, 128)
    source = align(open_checkpoint(path), model.weights())
    check(needs(model.weights()), source, model.ignored)
    for _, leaf in leaves(model.weights()):
        if isinstance(leaf, Linear):
            rows = sum(array.shape[0] for array in assemble(leaf, source).weights)
            assert rows == sum(leaf.out_features)


def test_one_error_names_everything(tmp_path: Path) -> None:
    tensors = {f"extra.{i}": torch.zeros(1) for i in range(12)} | {"wrong": torch.zeros(2, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    tree = {
        "wrong": Linear(sources=("wrong",), out_features=(1, 1), in_features=4),
        "absent": Linear(
            sources=("absent",), bias_sources=("absent.bias",), out_features=(5,), in_features=4
        ),
    }
    with pytest.raises(CheckpointError) as caught:
        check(needs(tree), open_checkpoint(tmp_path), [r"extra\.1"])
    message = str(caught.value)
    assert "lacks 2 tensors: absent (5, 4), absent.bias (5,)." in message
    assert "unknown to the model, 11 tensors: extra.0, extra." in message
    assert "and 1 more" in message
    assert "extra.1," not in message
    assert "of a wrong shape, 1 tensor: wrong (2, 3) instead of (2, 4)." in message


def test_a_transposed_shape(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 6)}, tmp_path / "model.safetensors")
    tree = {"w": Linear(sources=("w",), out_features=(3, 3), in_features=2, transposed=True)}
    check(needs(tree), open_checkpoint(tmp_path), [])


# Tied embeddings and names without their beginning


def test_the_output_layer_of_a_tied_checkpoint_is_ignored(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path, tie_word_embeddings=True)
    tokens = random_tokens(20)
    expected = transformers_logits(path, tokens)
    tensors = load_file(path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = torch.randn(384, 64)
    save_file(tensors, path / "model.safetensors")
    assert float((our_logits(path, tokens) - expected).abs().max()) < 1e-4
    head = model_of(path, 64).weights()["lm_head"]
    assert head.tied_to == "embed"


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("gpt2", "transformer."), ("opt", "model."), ("opt", "model.decoder."), ("llama", "model.")],
)
def test_names_without_their_beginning(family: str, prefix: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    tokens = random_tokens(20)
    expected = our_logits(path, tokens)
    tensors = load_file(path / "model.safetensors")
    renamed = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert set(renamed) != set(tensors)
    if family == "gpt2":
        renamed["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
        renamed["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(renamed, path / "model.safetensors")
    assert torch.equal(our_logits(path, tokens), expected)


def test_a_checkpoint_of_the_base_class(tmp_path: Path) -> None:
    path = make_checkpoint("gpt2", tmp_path / "whole")
    tokens = random_tokens(20)
    base = AutoModelForCausalLM.from_pretrained(path).transformer
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text((path / "config.json").read_text())
    assert torch.equal(our_logits(tmp_path / "base", tokens), our_logits(path, tokens))


def test_alignment_leaves_errors_alone(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, llama / "model.safetensors")
    tree = model_of(llama, 64).weights()
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor: model\.norm\.weight \(64,\)\."):
        check(needs(tree), align(open_checkpoint(llama), tree), [r".*\.inv_freq"])


# Made-up weights


@pytest.mark.parametrize("family", list(FAMILIES))
def test_dummy_weights_make_sense(family: str, tmp_path: Path) -> None:
    model = model_of(make_checkpoint(family, tmp_path), 64)
    source = Dummy(model.weights(), "float32", seed=3)
    check(needs(model.weights()), source, [])
    logits = logits_of(model, source, random_tokens(16))
    assert bool(torch.isfinite(logits).all())
    assert float(logits.std()) > 1e-4
    assert torch.equal(
        logits, logits_of(model, Dummy(model.weights(), "float32", 3), random_tokens(16))
    )


def test_dummy_tensors(tmp_path: Path) -> None:
    tree = model_of(make_checkpoint("gemma2", tmp_path), 64).weights()
    source, again = Dummy(tree, "bfloat16", 1), Dummy(tree, "bfloat16", 1)
    first = source.tensor("model.embed_tokens.weight")
    assert first.dtype == ml_dtypes.bfloat16
    assert first.shape == source.shapes["model.embed_tokens.weight"] == (384, 64)
    np.testing.assert_array_equal(first, again.tensor("model.embed_tokens.weight"))
    other = Dummy(tree, "bfloat16", 2).tensor("model.embed_tokens.weight")
    assert not np.array_equal(first, other)
    queries, outputs = (
        source.tensor(f"model.layers.0.self_attn.{name}_proj.weight") for name in "qo"
    )
    assert not np.array_equal(queries, outputs)
    norm = assemble(tree["norm"], source).weights[0]
    assert 0.9 < float(norm.mean()) < 1.1
    assert source.total_bytes == 2 * sum(np.prod(shape) for shape in source.shapes.values())


def test_large_dummy_tensors_are_cheap() -> None:
    shape = (8192, 8192)
    source = Dummy({"w": Tensor(source="w", shape=shape)}, "bfloat16")
    started = time.process_time()
    array = source.tensor("w")
    assert time.process_time() - started < 4.0
    assert array.shape == shape
    assert len(np.unique(array[:, 0].astype(np.float32))) > 100


def test_dummy_dtypes() -> None:
    with pytest.raises(UnsupportedError, match="'int4'; allowed: float32, float16, bfloat16"):
        Dummy({}, "int4")


def test_what_is_not_asked_for_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint("llama", tmp_path)
    model, touched = model_of(folder, 64), set[str]()
    config = RunnerConfig(
        model_path=folder,
        hf_config=config_of(folder),
        model_impl="native",
        load_format="safetensors",
        dtype="float32",
        kv_dtype="float32",
        block_size=16,
        max_model_len=64,
        max_num_seqs=2,
        max_num_batched_tokens=64,
    )
    read_ahead = Shard.read_ahead

    def watched(shard: Shard, name: str) -> None:
        touched.add(name)
        read_ahead(shard, name)

    monkeypatch.setattr(Shard, "read_ahead", watched)
    asked: dict[str, Parts] = {}

    def bind(path: str, leaf: Leaf, unread: Unread) -> object:
        assert unread.scheme is None
        if path.endswith("mlp.down"):
            return path
        asked[path] = unread.read()
        return asked[path]

    progress = []
    loading = read_weights(model, config, bind)
    while True:
        try:
            progress.append(next(loading))
        except StopIteration as end:
            tree = end.value
            break
    assert tree["layers"][1]["mlp"]["down"] == "layers.1.mlp.down"
    assert tree["layers"][1]["mlp"]["gate_up"] is asked["layers.1.mlp.gate_up"]
    assert not any("down_proj" in name for name in touched)
    assert any("gate_proj" in name for name in touched)
    in_all = open_checkpoint(folder).total_bytes
    assert progress[-1] == (in_all, in_all)
    assert {total for _, total in progress} == {in_all}
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
