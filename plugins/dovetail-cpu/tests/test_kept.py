"""Packed weights on disk: the next start maps them, and what it computes is the same."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_kernels import NAMES
from cpu_kernels.keeping import files, written
from dovetail_cpu import kept
from dovetail_cpu.kept import kept_folder, mapped_bytes, panel_file
from dovetail_cpu.kernels import Kernels
from safetensors.torch import load_file, save_file

from dovetail.core.models.shard import Shard
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core

pytestmark = pytest.mark.skipif(not NAMES, reason="the kernels were not compiled")

PROMPTS = [[1, 2, 3, 4, 5], [7] * 40]


def tokens(model: Path, **settings: Any) -> tuple[list[Any], int]:
    """What an engine says, and how much of its weights it has mapped."""
    core = make_core(model, "cpu", dtype="bfloat16", **settings)
    said = [(each.token_ids, each.logprobs) for each in answer(core, PROMPTS)]
    mapped = mapped_bytes()
    core.close()
    return said, mapped


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_second_start_maps_and_says_the_same(
    family: str, quantization: str | None, folder: Path, tmp_path: Path
) -> None:
    model = make_checkpoint(family, tmp_path / "model", dtype="bfloat16")
    first, mapped = tokens(model, quantization=quantization)
    assert mapped == 0
    (file,) = files(folder)
    assert file.name.startswith("model-")
    stored = load_file(file)  # the library takes the file for what it claims to be
    begins = {name: entry.begin for name, entry in Shard(file).entries.items()}
    assert all(begin % 64 == 0 for begin in begins.values())
    second, mapped = tokens(model, quantization=quantization)
    assert second == first
    sizes = [t.nbytes for name, t in stored.items() if name.split("/")[2].isdigit()]
    assert sum(sizes) == mapped > 0
    assert quantization in {None, *(name.split("/")[1] for name in stored)}
    assert files(folder) == [file]
    gc.collect()
    assert mapped_bytes() == 0


def test_ways_of_packing_have_files_of_their_own(folder: Path, tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path / "model", dtype="bfloat16")
    plain, _ = tokens(model)
    quantized, mapped = tokens(model, quantization="int8")
    assert mapped == 0
    assert len(files(folder)) == 2
    assert tokens(model)[0] == plain
    assert tokens(model, quantization="int8")[0] == quantized
    assert len(files(folder)) == 2


def test_a_checkpoint_that_was_changed_is_packed_again(folder: Path, tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path / "model", dtype="bfloat16")
    before, _ = tokens(model)
    other = make_checkpoint("llama", tmp_path / "other", dtype="bfloat16", seed=1)
    shutil.copy(other / "model.safetensors", model / "model.safetensors")
    after, mapped = tokens(model)
    assert mapped == 0
    assert after != before
    assert len(files(folder)) == 2


def test_layers_of_deterministic_mode_are_not_kept(folder: Path, tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path / "model", dtype="bfloat16")
    tokens(model)
    _, mapped = tokens(model, deterministic=True)
    assert mapped == 0
    assert len(files(folder)) == 1


def test_made_up_weights_are_not_kept(folder: Path, tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path / "model", dtype="bfloat16")
    tokens(model, load_format="dummy")
    assert files(folder) == []


def test_nothing_is_kept_if_it_is_off_or_little(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint("llama", tmp_path / "model", dtype="bfloat16")
    monkeypatch.setattr(kept, "_LEAST", 1 << 30)
    tokens(model)
    assert files(folder) == []
    monkeypatch.setattr(kept, "_LEAST", 1)
    monkeypatch.setenv(kept.VARIABLE, "off")
    tokens(model)
    assert files(folder) == []


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_folder({kept.VARIABLE: "off"}) is None
    assert kept_folder({kept.VARIABLE: "/a/b"}) == Path("/a/b")
    assert kept_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/dovetail/cpu")
    assert kept_folder({}) == Path.home() / ".cache/dovetail/cpu"

    def nobody(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    assert kept_folder({}) is None


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}", b"x" * 5000])
def test_a_broken_file_is_replaced(
    content: bytes, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_checkpoint("llama", tmp_path / "model", dtype="bfloat16")
    first, _ = tokens(model)
    (file,) = files(folder)
    whole = file.read_bytes()
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again, mapped = tokens(model)
    assert (again, mapped) == (first, 0)
    assert any("made again" in record.getMessage() for record in caplog.records)
    assert files(folder) == [file]
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_made(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_checkpoint("llama", tmp_path / "model", dtype="bfloat16")
    folder.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        _, mapped = tokens(model)
        written()
    assert mapped == 0
    assert any("are not kept in" in record.getMessage() for record in caplog.records)
    assert folder.read_text() == "in the way"


def test_a_process_that_dies_while_it_writes_leaves_one_file_for_the_next(
    folder: Path, tmp_path: Path
) -> None:
    model = make_checkpoint("llama", tmp_path / "model", dtype="bfloat16")
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from dovetail_cpu import kept\n"
        "from tests.engines import make_core\n"
        "kept._LEAST = 1\n"
        "kept.os.fsync = lambda _: os._exit(7)\n"
        "make_core(Path(sys.argv[1]), 'cpu', dtype='bfloat16')\n"
        "kept.threading.Event().wait(60)\n"
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script, model], check=False, cwd=Path(__file__).parents[3]
        )
        assert done.returncode == 7
        (left,) = files(folder)
        assert left.suffix == ".unfinished"
    _, mapped = tokens(model)
    assert mapped == 0
    (file,) = files(folder)
    assert file.suffix == ".safetensors"
    assert tokens(model)[1] > 0


def test_the_file_depends_on_everything_that_packing_does(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint("llama", tmp_path / "model", dtype="bfloat16")
    core = make_core(model, "cpu", dtype="bfloat16")
    config = core.runner._config  # type: ignore[attr-defined]
    core.close()
    names = {panel_file(tmp_path, config, kernels).name}
    for change in (
        {"dtype": "float32"},
        {"quantization": "int8"},
        {"hf_config": {**config.hf_config, "quantization_config": {"bits": 4}}},
    ):
        names.add(panel_file(tmp_path, replace(config, **change), kernels).name)
    newer = [replace(entry, version="9.9") for entry in kept.installed_entries()]
    monkeypatch.setattr(kept, "installed_entries", lambda: newer)
    names.add(panel_file(tmp_path, config, kernels).name)
    monkeypatch.setattr(kept, "_digest_of_library", lambda: "another")
    names.add(panel_file(tmp_path, config, kernels).name)
    os.utime(model / "model.safetensors", (1, 1))
    names.add(panel_file(tmp_path, config, kernels).name)
    save_file({"more": torch.zeros(1)}, model / "more.safetensors")
    names.add(panel_file(tmp_path, config, kernels).name)
    assert len(names) == 8
    same = panel_file(tmp_path, replace(config, max_num_seqs=3, seed=7), kernels).name
    assert same in names
