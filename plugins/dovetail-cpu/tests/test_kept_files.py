"""Files of packed weights: what is in them, who writes them and when they go."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cpu_kernels import NAMES
from cpu_kernels.keeping import LEAF, files, keep, linear
from dovetail_cpu import kept
from dovetail_cpu.integers import Int8Panels
from dovetail_cpu.kept import KeptPanels, mapped_bytes
from dovetail_cpu.kernels import Kernels
from dovetail_cpu.memory import HugePages, share_in_large_pages
from dovetail_cpu.platform import CpuPlatform

pytestmark = pytest.mark.skipif(not NAMES, reason="the kernels were not compiled")


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
