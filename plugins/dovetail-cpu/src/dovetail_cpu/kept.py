"""Packed weights on disk: the next start maps them instead of packing the checkpoint's again.

They are kept in a folder of the user's cache, a safetensors file for each checkpoint and way of
packing it, whose arrays begin at whole lines of the processor's cache. A file is written in the
background, once the weights are loaded, and takes its name when it is complete. Of a process that
died on the way at most one unfinished file for each of them is left, until somebody writes another.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from torch import Tensor

from dovetail.core.contracts.model import Linear
from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.errors import CheckpointError
from dovetail.core.models.shard import Shard
from dovetail.core.plugins.entries import installed_entries
from dovetail.platforms.torch.dtypes import from_numpy
from dovetail_cpu.integers import Int4Panels, Int8Panels
from dovetail_cpu.kernels import LIBRARY, Kernels
from dovetail_cpu.linear import PanelLayer, PanelLinear
from dovetail_cpu.memory import HugePages, share_in_large_pages

__all__ = ["VARIABLE", "KeptPanels", "kept_folder", "mapped_bytes", "panel_file"]

VARIABLE = "DOVETAIL_CPU_CACHE"
"""Environment: the folder, or ``off``."""
_LEAST = 64 << 20
"""Bytes that are worth a file: fewer are packed in a moment."""
_SHARE = 0.2
"""Of the disk's free space, that all files together may take."""
_KINDS = {kind.kind: kind for kind in (PanelLinear, Int8Panels, Int4Panels)}
_TELLING = 256 << 20
"""Bytes that are mapped before the system is asked in which pages."""
_LARGE_SHARE = 0.1
"""Of a file in large pages; with fewer it is of a file system that has none."""
_PAGE = 4096
_PIECE = 16 << 20
"""Bytes that are written at a time."""
_UNFINISHED = ".unfinished"
"""Behind the name of a file that somebody writes, who holds a lock on it, or wrote when he died."""
_Shape: TypeAlias = tuple[torch.dtype, tuple[int, ...]]
_Shapes: TypeAlias = dict[str, _Shape]

_NAMES = {torch.int32: "I32", torch.int64: "I64", torch.float32: "F32"}
_log = logging.getLogger(__name__)


def kept_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where packed weights are kept; None: nowhere."""
    wanted = environ.get(VARIABLE, "")
    if wanted == "off":
        return None
    if wanted:
        return Path(wanted).expanduser()
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    with contextlib.suppress(RuntimeError):  # nobody's home is known
        return Path(base).expanduser() / "dovetail" / "cpu"
    return None


def panel_file(folder: Path, config: RunnerConfig, kernels: Kernels) -> Path:
    """The file for a checkpoint as it is now, packed by what is installed for these kernels."""
    model = config.model_path.resolve()
    files = sorted(model.glob("*.safetensors"))
    facts = {
        "files": [(str(file), *_identity(file)) for file in files],
        "dtype": config.dtype,
        "quantization": config.quantization,
        "stored": config.hf_config.get("quantization_config"),
        "kernels": [kernels.instruction_set, _digest_of_library()],
        # Whoever may have a part in it: models and schemes of other packages, too.
        "packages": sorted({entry.origin for entry in installed_entries()}),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", model.name)[:60]
    return folder / f"{name}-{digest[:24]}.safetensors"


def _identity(file: Path) -> tuple[int, int, int]:
    """What changes when a file does."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


@cache
def _digest_of_library() -> str:
    return hashlib.sha256(LIBRARY.read_bytes()).hexdigest()


class _Count:
    """Bytes of this process's layers that lie in mapped files."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # layers may be collected at any point of this thread
        self.bytes = 0

    def add(self, num_bytes: int) -> None:
        """More, or fewer."""
        with self._lock:
            self.bytes += num_bytes


_mapped = _Count()


def mapped_bytes() -> int:
    """Bytes of files that layers of this process read from.

    The system counts them as memory that can be had, but every step reads them.
    """
    return _mapped.bytes


class KeptPanels:
    """``KeptLayers`` whose weights are panels: of others nothing is kept.

    Args:
        file: See ``panel_file``.
        kernels: For this processor.
        memory: For weights that are copied from the file, where it is mapped in small pages.
    """

    def __init__(self, file: Path, kernels: Kernels, memory: HugePages) -> None:
        self._file = file
        self._kernels = kernels
        self._memory = memory
        self._num_mapped = 0
        self._copies: bool | None = None
        """Whether what is found is copied; None: that is not known yet."""
        self._layers: dict[str, tuple[weakref.ref[PanelLayer], Linear]] = {}
        """What is to be kept, as long as somebody else holds it, by path."""
        self._shapes: _Shapes = {}
        """Of its arrays, by their names in the file."""
        self._shard = self._opened()

    def _opened(self) -> Shard | None:
        if not self._file.exists():
            return None
        try:
            shard = Shard(self._file)
        except (CheckpointError, OSError) as error:
            _log.warning("packed weights are not used, and made again: %s", error)
            return None
        with contextlib.suppress(OSError):  # a folder that is only read is never made room in
            os.utime(self._file)
        return shard

    def find(self, path: str, leaf: Linear) -> PanelLayer | None:
        """See ``KeptLayers``."""
        shard = self._shard
        if shard is None:
            return None
        for name, kind in _KINDS.items():
            start = f"{path}/{name}/"
            if f"{start}about" in shard.entries:
                return self._restored(shard, kind, start, leaf)
        return None

    def _restored(
        self, shard: Shard, kind: type[PanelLayer], start: str, leaf: Linear
    ) -> PanelLayer | None:
        columns, inputs, *digest = shard.tensor(f"{start}about").tolist()
        if digest != _digest(leaf):
            return None
        bias = from_numpy(shard.tensor(f"{start}bias")) if f"{start}bias" in shard.entries else None
        arrays: list[Tensor] = []
        num_bytes = 0
        while (name := f"{start}{len(arrays)}") in shard.entries:
            shard.read_ahead(name)
            array = from_numpy(shard.tensor(name))
            if self._is_better_copied():
                array = self._memory.empty(tuple(array.shape), array.dtype).copy_(array)
            else:
                num_bytes += array.nbytes
            arrays.append(array)
        layer = kind.restored(self._kernels, (columns, inputs), arrays, bias)
        self._num_mapped += num_bytes
        _mapped.add(num_bytes)
        weakref.finalize(layer, _mapped.add, -num_bytes)
        return layer

    def _is_better_copied(self) -> bool:
        """What was mapped first tells for the rest of the file, and stays where it is."""
        if self._copies is None and self._num_mapped >= _TELLING:
            share = share_in_large_pages(self._file)
            self._copies = share is not None and share < _LARGE_SHARE
        return bool(self._copies)

    def keep(self, path: str, leaf: Linear, bound: Any) -> None:
        """See ``KeptLayers``."""
        if type(bound) in _KINDS.values():
            self._layers[path] = weakref.ref(bound), leaf
            for name, array in _arrays(path, leaf, bound):
                self._shapes[name] = array.dtype, tuple(array.shape)

    def finish(self) -> None:
        """Write the file in the background, if there was none."""
        if self._shard is not None:
            if self._layers:
                _log.warning("packed weights are of another model, and are dropped: %s", self._file)
                self._file.unlink(missing_ok=True)
            return
        size = sum(map(_size, self._shapes.values()))
        if size < _LEAST:
            return
        threading.Thread(
            target=self._write, args=(size,), name="packed weights", daemon=True
        ).start()

    def _write(self, size: int) -> None:
        folder = self._file.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self._file.with_name(self._file.name + _UNFINISHED)) as file:
                if file is not None and self._make_room(folder, size) and self._write_to(file):
                    file.flush()
                    os.fsync(file.fileno())
                    Path(file.name).replace(self._file)
                    _log.info("packed weights are kept in %s", self._file)
        except OSError as error:
            advice = f"{VARIABLE} names another folder, or off"
            _log.warning("packed weights are not kept in %s: %s; %s", folder, error, advice)

    def _make_room(self, folder: Path, size: int) -> bool:
        """Drop what has not been used for longest; False: it would not help."""
        for left in folder.glob(f"*{_UNFINISHED}"):
            with _locked(left):
                pass
        files = [file for file in folder.glob("*.safetensors") if file != self._file]
        found = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in files)
        taken = sum(entry[1] for entry in found)
        room = int(_SHARE * (shutil.disk_usage(folder).free + taken))
        if size > room:
            _log.info(
                "packed weights are not kept: %d MB, with room for %d", size >> 20, room >> 20
            )
            return False
        for _, num_bytes, file in found:
            if taken + size > room:
                file.unlink(missing_ok=True)
                taken -= num_bytes
        return True

    def _write_to(self, file: IO[bytes]) -> bool:
        """False: a layer is not used any more."""
        _write_header(file, self._shapes)
        for path, (held, leaf) in self._layers.items():
            layer = held()
            if layer is None:
                return False
            for _, array in _arrays(path, leaf, layer):
                flat = array.contiguous().view(-1).view(torch.uint8).numpy().data
                for begin in range(0, len(flat), _PIECE):
                    file.write(flat[begin : begin + _PIECE])
        return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes] | None]:
    """An empty file that nobody else writes; None: somebody does. It goes unless it is renamed."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        if not _is(path, file):  # whoever held the lock has renamed it meanwhile
            yield None
            return
        try:
            file.truncate(0)
            yield file
        finally:
            if _is(path, file):
                path.unlink()


def _is(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _arrays(path: str, leaf: Linear, layer: PanelLayer) -> Iterator[tuple[str, Tensor]]:
    """The arrays of a layer with their names: each takes a multiple of 64 bytes."""
    arrays, bias = layer.arrays()
    start = f"{path}/{layer.kind}/"
    about = [layer.num_columns, layer.num_inputs, *_digest(leaf)]
    yield f"{start}about", torch.tensor(about)
    if bias is not None:
        yield f"{start}bias", bias
    for number, array in enumerate(arrays):
        yield f"{start}{number}", array


def _digest(leaf: Linear) -> list[int]:
    """Six numbers that another declaration of a layer does not have."""
    text = repr(leaf).encode()
    whole = hashlib.sha512(text).digest()[: 6 * 8]
    return [int.from_bytes(whole[i : i + 8], "little", signed=True) for i in range(0, 48, 8)]


def _size(shape: _Shape) -> int:
    dtype, extents = shape
    return dtype.itemsize * math.prod(extents)


def _write_header(file: IO[bytes], shapes: _Shapes) -> None:
    """Eight bytes of length, and JSON up to the end of a page, behind which the arrays begin.

    Format: https://huggingface.co/docs/safetensors.
    """
    entries, begin = {}, 0
    for name, shape in shapes.items():
        dtype, extents = shape
        end = begin + _size(shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": extents, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % _PAGE)
    file.write(len(text).to_bytes(8, "little") + text)
