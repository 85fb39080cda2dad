from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from dovetail.core.models import page_cache
from dovetail.core.models.page_cache import brought_ahead

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no hints")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(page_cache, "_PIECE", 1000)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"a" * 2500)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"b" * 1000)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


class Asked:
    """Takes the system's place."""

    def __init__(self, error: OSError | None = None) -> None:
        self.pieces: list[tuple[str, int, int]] = []
        self.done = threading.Event()
        self.error = error
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, handle: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        self.pieces.append((Path(f"/proc/self/fd/{handle}").readlink().name, start, length))
        self.done.set()
        assert self.go_on.wait(10)
        if self.error is not None:
            raise self.error


def finished(asked: Asked, count: int) -> None:
    for _ in range(1000):
        if len(asked.pieces) >= count:
            return
        threading.Event().wait(0.01)
    pytest.fail(f"only {asked.pieces} were asked for")


def test_every_piece_of_every_file_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked()
    monkeypatch.setattr(os, "posix_fadvise", asked)
    with brought_ahead(folder, 1 << 20):
        finished(asked, 4)
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    assert asked.pieces == [
        *((first, start, 1000) for start in (0, 1000, 2000)),
        (second, 0, 1000),
    ]


def test_it_ends_with_the_context(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    asked.go_on.clear()
    monkeypatch.setattr(os, "posix_fadvise", asked)
    with brought_ahead(folder, 1 << 20):
        assert asked.done.wait(10)
        threading.Timer(0.1, asked.go_on.set).start()
    assert len(asked.pieces) == 1
    assert "reading weights ahead" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("most_bytes", [0, 3499])
def test_files_that_would_drive_each_other_out_are_left_alone(
    most_bytes: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked()
    monkeypatch.setattr(os, "posix_fadvise", asked)
    with brought_ahead(folder, most_bytes):
        assert "reading weights ahead" not in [thread.name for thread in threading.enumerate()]
    assert not asked.pieces


def test_a_refusal_is_told_and_harms_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Asked(OSError("no such advice"))
    monkeypatch.setattr(os, "posix_fadvise", asked)
    with caplog.at_level(logging.INFO, page_cache.__name__), brought_ahead(folder, 1 << 20):
        finished(asked, 1)
    assert "no such advice" in caplog.text and len(asked.pieces) == 1


def test_systems_without_hints_do_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    for each in (folder, folder / "nothing"):
        with brought_ahead(each, 1 << 20):
            names = [thread.name for thread in threading.enumerate()]
        assert "reading weights ahead" not in names
