"""Packed weights on disk: the next start maps them, and what it computes is the same."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_kernels import NAMES
from dovetail_cpu import kept
from dovetail_cpu.integers import Int8Panels
from dovetail_cpu.kept import KeptPanels, kept_folder, mapped_bytes, panel_file
from dovetail_cpu.kernels import Kernels
from dovetail_cpu.linear import PanelLinear
from dovetail_cpu.memory import HugePages, share_in_large_pages
from dovetail_cpu.platform import CpuPlatform
from safetensors.torch import load_file, save_file

from dovetail.core.contracts.model import Linear
from dovetail.core.models.shard import Shard
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core

pytestmark = pytest.mark.skipif(not NAMES, reason="the kernels were not compiled")

PROMPTS = [[1, 2, 3, 4, 5], [7] * 40]
LEAF = Linear(sources=("w",), out_features=(70,), in_features=96)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything is kept, however small."""
    place = tmp_path / "cache"
    monkeypatch.setenv(kept.VARIABLE, str(place))
    monkeypatch.setattr(kept, "_LEAST", 1)
    return place


def written() -> None:
    """Wait for whoever is writing."""
    for thread in threading.enumerate():
        if thread.name == "packed weights":
            thread.join(60)
            assert not thread.is_alive()


def files(folder: Path) -> list[Path]:
    written()
    return sorted(folder.iterdir()) if folder.exists() else []


def tokens(model: Path, **settings: Any) -> tuple[list[Any], int]:
    """What an engine says, and how much of its weights it has mapped."""
    core = make_core(model, "cpu", dtype="bfloat16", **settings)
    said = [(each.token_ids, each.logprobs) for each in answer(core, PROMPTS)]
    mapped = mapped_bytes()
    core.close()
    return said, mapped


def linear(kernels: Kernels, memory: HugePages, seed: int = 0) -> PanelLinear:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(70, 96, generator=random).bfloat16()
    return PanelLinear(kernels, memory, weight, torch.randn(70, generator=random).bfloat16())


def keep(file: Path, kernels: Kernels, layers: dict[str, Any], leaf: Linear = LEAF) -> KeptPanels:
    """A start that finds nothing, or nothing that is right."""
    store = KeptPanels(file, kernels, HugePages())
    for path, layer in layers.items():
        assert store.find(path, leaf) is None
        store.keep(path, leaf, layer)
    store.finish()
    written()
    return store


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


def test_the_memory_of_mapped_weights_is_not_free(
    kernels: Kernels, memory: HugePages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = CpuPlatform()
    total = cpu.memory().total
    before = cpu.memory().free
    monkeypatch.setattr(kept._mapped, "bytes", total // 4)
    assert cpu.memory().free < before - total // 8
    monkeypatch.setattr(kept._mapped, "bytes", total)
    assert cpu.memory().free == 0


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


def test_a_layer_comes_back_with_its_bits(
    kernels: Kernels, memory: HugePages, folder: Path, tmp_path: Path
) -> None:
    layer, file = linear(kernels, memory), folder / "x.safetensors"
    codes = torch.randint(-128, 128, (70, 95), dtype=torch.int8)
    eight = Int8Panels(kernels, memory, codes, torch.rand(70), None)
    keep(file, kernels, {"a": layer, "b": eight, "c": torch.nn.Linear(2, 2)})
    store = KeptPanels(file, kernels, HugePages())
    assert store.find("c", LEAF) is None
    x = torch.randn(5, 96).bfloat16()
    for path, made, inputs in (("a", layer, x), ("b", eight, x[:, :95])):
        found = store.find(path, LEAF)
        assert type(found) is type(made)
        assert found is not None
        assert torch.equal(found(inputs), made(inputs))
        assert (found.num_columns, found.num_inputs) == (made.num_columns, made.num_inputs)
    store.finish()
    assert file.exists()


@pytest.mark.parametrize(("share", "copied"), [(0.0, 1), (0.09, 1), (0.2, 0), (None, 0)])
def test_a_file_that_is_mapped_in_small_pages_is_copied(
    share: float | None,
    copied: int,
    kernels: Kernels,
    memory: HugePages,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, file = linear(kernels, memory), folder / "x.safetensors"
    keep(file, kernels, dict.fromkeys("abc", layer))
    asked: list[Path] = []
    size = layer.arrays()[0][0].nbytes

    def share_in_large_pages(path: Path) -> float | None:
        asked.append(path)
        return share

    monkeypatch.setattr(kept, "_TELLING", 2 * size)
    monkeypatch.setattr(kept, "share_in_large_pages", share_in_large_pages)
    store = KeptPanels(file, kernels, memory)
    found = [store.find(name, LEAF) for name in "abca"]
    assert asked == [file]
    assert mapped_bytes() == (2 if copied else 4) * size
    x = torch.randn(5, 96).bfloat16()
    assert all(torch.equal(each(x), layer(x)) for each in found if each is not None)


def test_what_the_system_says_of_pages(tmp_path: Path) -> None:
    smaps, enabled, file = tmp_path / "smaps", tmp_path / "enabled", tmp_path / "a b.safetensors"
    enabled.write_text("always [madvise] never\n")

    def said(resident: int, large: int) -> float | None:
        smaps.write_text(
            "7f00-7f01 rw-p 00000000 00:00 0 \nRss: 9000 kB\nAnonHugePages: 9000 kB\n"
            f"7f02-7f03 r--s 00000000 fe:00 12    {file}\nRss: {resident} kB\n"
            f"FilePmdMapped: {large} kB\nVmFlags: rd mr\n"
            "7f04-7f05 r--p 00000000 fe:00 13    /lib/c.so\nRss: 70 kB\nFilePmdMapped: 0 kB\n"
        )
        return share_in_large_pages(file, smaps=smaps, enabled=enabled)

    assert said(1000, 600) == 0.6
    assert said(1000, 0) == 0.0
    assert said(0, 0) is None
    enabled.write_text("always madvise [never]\n")
    assert said(1000, 400) is None
    enabled.unlink()
    assert said(1000, 400) is None
    assert share_in_large_pages(file) is None


def test_another_declaration_is_not_mistaken_for_this_one(
    kernels: Kernels, memory: HugePages, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layer, file = linear(kernels, memory), folder / "x.safetensors"
    keep(file, kernels, {"a": layer})
    other = replace(LEAF, sources=("v",))
    with caplog.at_level(logging.WARNING):
        keep(file, kernels, {"a": layer}, other)
    assert "of another model" in caplog.text
    assert files(folder) == []
    keep(file, kernels, {"a": layer}, other)
    assert KeptPanels(file, kernels, memory).find("a", other) is not None


def test_a_layer_that_nobody_holds_any_more_is_not_written(
    kernels: Kernels, memory: HugePages, folder: Path
) -> None:
    store, layer = KeptPanels(folder / "x.safetensors", kernels, memory), linear(kernels, memory)
    store.keep("a", LEAF, layer)
    del layer
    gc.collect()
    store.finish()
    assert files(folder) == []


def test_room_is_made_by_what_was_not_used_for_longest(
    kernels: Kernels, memory: HugePages, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = linear(kernels, memory)
    for age, name in enumerate("abc"):
        file = folder / f"{name}.safetensors"
        keep(file, kernels, {"a": layer})
        os.utime(file, (0, 1000 - 100 * age))
    size = file.stat().st_size
    KeptPanels(folder / "c.safetensors", kernels, memory)  # used again: the oldest is b now
    monkeypatch.setattr(kept, "_SHARE", 0.5)
    monkeypatch.setattr(
        kept.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 3 * size)
    )
    keep(folder / "d.safetensors", kernels, {"a": layer})
    assert [file.stem for file in files(folder)] == ["a", "c", "d"]
    monkeypatch.setattr(kept, "_SHARE", 1e-3)
    keep(folder / "e.safetensors", kernels, {"a": layer})
    assert [file.stem for file in files(folder)] == ["a", "c", "d"]


def test_what_was_left_unfinished_is_cleared_away_or_written_over(
    kernels: Kernels, memory: HugePages, folder: Path
) -> None:
    folder.mkdir()
    for name in ("x", "y", "z"):
        (folder / f"{name}.safetensors.unfinished").write_text("part" * 10000)
    with (folder / "z.safetensors.unfinished").open("ab") as somebody:
        fcntl.flock(somebody, fcntl.LOCK_EX)
        layer = linear(kernels, memory)
        keep(folder / "x.safetensors", kernels, {"a": layer})
        left = ["x.safetensors", "z.safetensors.unfinished"]
        assert [file.name for file in files(folder)] == left
        keep(folder / "z.safetensors", kernels, {"a": layer})  # somebody is already writing it
        assert [file.name for file in files(folder)] == left
    keep(folder / "z.safetensors", kernels, {"a": layer})
    x, z = files(folder)
    assert x.read_bytes() == z.read_bytes()


def test_what_was_renamed_meanwhile_is_left_alone(folder: Path) -> None:
    folder.mkdir()
    path, final = folder / "x.unfinished", folder / "x"
    with path.open("ab") as opened:
        opened.write(b"whole")
        opened.flush()
        path.rename(final)
        assert not kept._is(path, opened)
        path.write_bytes(b"another")
        assert not kept._is(path, opened)
    assert final.read_bytes() == b"whole"


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


def test_a_full_disk_leaves_nothing(
    kernels: Kernels,
    memory: HugePages,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        keep(folder / "x.safetensors", kernels, {"a": linear(kernels, memory)})
    assert "No space left" in caplog.text
    assert files(folder) == []


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
