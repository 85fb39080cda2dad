"""One safetensors file, mapped into memory.

Format: https://huggingface.co/docs/safetensors: eight bytes of header length, a JSON header, data.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dovetail.core.errors import CheckpointError

__all__ = ["DTYPES", "Entry", "Shard"]

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Dtypes by the names of the format."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor lies."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    """Byte of the file, counted from its start."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


_MADV_POPULATE_READ = 22
"""Linux 5.14 and later; Python has no name for it yet."""


class Shard:
    """A file and its tensors. The header is read at once, the data mapped on first use.

    Raises:
        CheckpointError: The file is truncated, or its header is not what the format allows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: Mapping[str, Entry] = _read_entries(path)
        self._map: mmap.mmap | None = None

    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        """A read-only view into the file: bytes are read when they are touched."""
        entry = self.entries[name]
        values = np.frombuffer(
            self._mapped(), entry.dtype, count=math.prod(entry.shape), offset=entry.begin
        )
        return values.reshape(entry.shape)

    def read_ahead(self, name: str) -> None:
        """Have the system map a tensor's pages at once, which costs less than one by one.

        Waits for the disk if the file is not cached. Where the system cannot do it, nothing
        happens: pages are mapped as they are touched.
        """
        entry = self.entries[name]
        start = entry.begin - entry.begin % mmap.PAGESIZE
        length = entry.begin + entry.num_bytes - start
        if entry.num_bytes and sys.platform == "linux":
            with contextlib.suppress(OSError):
                self._mapped().madvise(_MADV_POPULATE_READ, start, length)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a system without large pages
                    self._map.madvise(mmap.MADV_HUGEPAGE)
        return self._map


def _read_entries(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _broken(path, f"its header claims {length} bytes, the file has {size}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not valid JSON ({error!s:.80})") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, raw, 8 + length, size) for name, raw in header.items()}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _entry(path: Path, name: str, raw: object, start: int, size: int) -> Entry:
    match raw:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            if not all(type(extent) is int and extent >= 0 for extent in shape):
                raise _broken(path, f"{name!r:.80} has the shape {shape!r:.80}")
        case _:
            raise _broken(path, f"the entry of {name!r:.80} lacks dtype, shape or data_offsets")
    if code not in DTYPES:
        raise CheckpointError(
            f"{path}: {name!r:.80} has the dtype {code!r:.20}; readable: {', '.join(DTYPES)}."
        )
    if not 0 <= begin <= end <= size - start:
        wanted = f"bytes {begin} to {end} of its data, which has {size - start}"
        raise _broken(path, f"{name!r:.80} lies at {wanted}")
    entry = Entry(dtype=DTYPES[code], shape=tuple(shape), begin=start + begin)
    if entry.num_bytes != end - begin:
        raise _broken(
            path, f"{name!r:.80} of shape {shape} and dtype {code} has {end - begin} bytes"
        )
    return entry


def _broken(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated or not a safetensors file: {problem}. Download it again."
    )
