from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dovetail.core.errors import CheckpointError
from dovetail.core.models.weights import (
    open_checkpoint,
)
from tests.checkpoints import make_checkpoint


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_checkpoint("llama", tmp_path / "llama")


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with any header at all, in a folder of its own; returns the folder."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# Reading


def test_views_of_every_dtype(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    dtypes += [torch.float8_e5m2, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shapes == dict.fromkeys(tensors, (2, 3))
    assert checkpoint.total_bytes == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        array = checkpoint.tensor(name)
        assert array.dtype.name == name.removeprefix("torch.")
        np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())
        checkpoint.read_ahead(name)


def test_arrays_are_views_of_the_file_and_read_only(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    first, second = (checkpoint.tensor("lm_head.weight") for _ in range(2))
    assert np.shares_memory(first, second)
    with pytest.raises(ValueError, match="read-only"):
        first[:] = 0


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    save_file({"none": torch.zeros(0, 4), "one": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.read_ahead("none")
    assert checkpoint.tensor("none").shape == (0, 4)
    assert checkpoint.tensor("one").shape == ()
    assert checkpoint.tensor("one") == 3.0


def test_sharded(tmp_path: Path) -> None:
    single = open_checkpoint(make_checkpoint("llama", tmp_path / "single"))
    folder = make_checkpoint("llama", tmp_path / "sharded", max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    sharded = open_checkpoint(folder)
    assert sharded.shapes == single.shapes
    assert sharded.total_bytes == single.total_bytes
    for name in single.shapes:
        np.testing.assert_array_equal(sharded.tensor(name), single.tensor(name))


def test_files_of_other_names(tmp_path: Path, llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    names = list(tensors)
    for part, chosen in (("a", names[:3]), ("b", names[3:])):
        save_file({name: tensors[name] for name in chosen}, tmp_path / f"{part}.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert set(open_checkpoint(tmp_path).shapes) == set(names)


# What can be wrong with a folder


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        open_checkpoint(tmp_path / "nothing")


def test_only_pickled_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"only: pytorch_model\.bin.*save_pretrained"):
        open_checkpoint(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"only: config\.json\. Expected model\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, max_shard_size="50KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of .* weight files: {gone.name}"):
        open_checkpoint(folder)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"twice": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"'twice' is in both .*a\.safetensors and .*b\."):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"x": "../x.safetensors"}}', "not a file name"),
        ('{"weight_map": {"x": 3}}', "not a file name"),
        ('{"weight_map": {"absent": "a.safetensors"}}', "does? not hold|do not hold: absent"),
    ],
)
def test_wrong_indices(tmp_path: Path, index: str, message: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


# What can be wrong with a file


@pytest.mark.parametrize("kept", [0, 3, 8, 40, -1])
def test_truncated_files(llama: Path, kept: int) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not"):
        open_checkpoint(llama)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 10**6])
def test_hostile_header_lengths(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    with pytest.raises(CheckpointError, match=f"claims {length} bytes"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b'{"x": 1}',
        b'{"x": {}, "x": {}}',
        {"x": {"dtype": "F32", "shape": [2]}},
        {"x": entry([2], 0, 4)},
        {"x": entry([2], 4, 12)},
        {"x": entry([2], 8, 0)},
        {"x": entry([-2], 0, 8)},
        {"x": entry([2], -8, 0)},
        {"x": entry([1 << 62, 1 << 62], 0, 8)},
        {"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8]}},
        {"x": {"dtype": 7, "shape": [2], "data_offsets": [0, 8]}},
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any) -> None:
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        open_checkpoint(write(tmp_path, header, bytes(8)))


def test_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'x' has the dtype 'F4'; readable: F64"):
        open_checkpoint(write(tmp_path, {"x": entry([2], 0, 8, "F4")}, bytes(8)))
