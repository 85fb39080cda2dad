"""Weights on their way from the disk while the platform starts.

Importing a framework and waking a device takes seconds in which nobody reads. The operating system
is asked meanwhile to bring the files into its page cache, where loading finds them, and many pieces
at a time, which disks like. It is only a hint: nothing is read twice, and where it cannot be given,
loading reads as it would have.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["brought_ahead"]

_log = logging.getLogger(__name__)

_PIECE = 1 << 17
"""Bytes that are asked for at a time. Of more, systems may read the beginning only."""


@contextmanager
def brought_ahead(folder: Path, most_bytes: int) -> Iterator[None]:
    """The safetensors files of a folder are brought into the page cache until the context ends.

    Args:
        folder: Of the checkpoint.
        most_bytes: If they are larger together, they would drive each other out: nothing is done.
    """
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    if not files or size > most_bytes or not hasattr(os, "posix_fadvise"):
        yield
        return
    stop = threading.Event()
    reader = threading.Thread(
        target=_bring, args=(files, stop), name="reading weights ahead", daemon=True
    )
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()


def _bring(files: Sequence[Path], stop: threading.Event) -> None:
    try:
        for file in files:
            with file.open("rb", buffering=0) as handle:
                for start in range(0, file.stat().st_size, _PIECE):
                    if stop.is_set():
                        return
                    os.posix_fadvise(handle.fileno(), start, _PIECE, os.POSIX_FADV_WILLNEED)
    except OSError as error:
        _log.info("weights are not read ahead: %s", error)
