"""Where a model is: a folder, the local Hugging Face cache, or the hub."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from dovetail.core.demo import DEMO_MODEL_NAME, demo_model_path
from dovetail.core.errors import CheckpointError

__all__ = ["cached_snapshot", "fetch", "hub_cache", "locate", "locate_locally"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "vocab*", "merges.txt"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def locate(
    model: str | None, *, tokenizer_only: bool = False, environ: Mapping[str, str] = os.environ
) -> Path:
    """The folder of a model, downloaded first if it is only on the hub.

    Args:
        model: A folder, a name on the hub, or None for the bundled model.
        tokenizer_only: Only the tokenizer's files are needed.
        environ: Where ``HF_HOME``, ``HF_HUB_CACHE`` and ``HF_HUB_OFFLINE`` are looked up.

    Raises:
        CheckpointError: There is no such model; one line that says what to do.
    """
    try:
        return locate_locally(model, tokenizer_only=tokenizer_only, environ=environ)
    except _NotDownloadedError:
        if model is None or _is_offline(environ):
            raise
        return fetch(model, tokenizer_only=tokenizer_only)


class _NotDownloadedError(CheckpointError):
    """The name looks like one of the hub, and the cache does not have it."""


def locate_locally(
    model: str | None, *, tokenizer_only: bool = False, environ: Mapping[str, str] = os.environ
) -> Path:
    """As :func:`locate`, without the network."""
    if model is None:
        return demo_model_path()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _with_config(folder, tokenizer_only)
    if folder.is_file():
        raise CheckpointError(f"{model} is a file; name the folder that holds config.json")
    if model == DEMO_MODEL_NAME:
        return demo_model_path()
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"model folder not found: {model}{_close_folder(folder)}")
    snapshot = cached_snapshot(model, tokenizer_only=tokenizer_only, environ=environ)
    if snapshot is None:
        raise _NotDownloadedError(
            f"model {model!r} is neither a folder here nor in the Hugging Face cache"
            f" ({hub_cache(environ)}){_close_folder(folder) or _offline_hint(model, environ)}"
        )
    return snapshot


def _with_config(folder: Path, tokenizer_only: bool) -> Path:
    wanted = _TOKENIZER_FILES if tokenizer_only else ("config.json",)
    if any((folder / name).is_file() for name in wanted):
        return folder
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    hint = f"; did you mean its folder {inside[0]}?" if inside else ""
    raise CheckpointError(f"{folder} holds no {' or '.join(wanted)}{hint}")


def _close_folder(folder: Path) -> str:
    """A hint with the sibling whose name is nearest; empty if there is none."""
    try:
        siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(folder.name, siblings, n=1, cutoff=0.6)
    return f"; did you mean {folder.parent / close[0]}?" if close else ""


def _offline_hint(model: str, environ: Mapping[str, str]) -> str:
    if _is_offline(environ):
        return "; unset HF_HUB_OFFLINE to download it, or name a folder"
    return f"; `hf download {model}` fetches it"


def _is_offline(environ: Mapping[str, str]) -> bool:
    return environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def hub_cache(environ: Mapping[str, str]) -> Path:
    """The folder of downloaded models, as the huggingface_hub library decides it."""
    if explicit := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(explicit).expanduser()
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or str(Path(base) / "huggingface")
    return Path(home).expanduser() / "hub"


def cached_snapshot(
    model: str, *, tokenizer_only: bool = False, environ: Mapping[str, str] = os.environ
) -> Path | None:
    """The downloaded folder of a hub model: its main branch, else the newest; None if none."""
    folder = hub_cache(environ) / f"models--{model.replace('/', '--')}"
    wanted = _TOKENIZER_FILES if tokenizer_only else ("config.json",)
    found = [
        path
        for path in (folder / "snapshots").glob("*")
        if any((path / name).is_file() for name in wanted)
    ]
    main = folder / "refs" / "main"
    commit = main.read_text().strip() if main.is_file() else None
    found.sort(key=lambda path: (path.name == commit, path.stat().st_mtime))
    return found[-1] if found else None


def fetch(model: str, *, tokenizer_only: bool = False) -> Path:
    """Download a model from the hub into the cache, with a progress bar; returns its folder.

    Raises:
        CheckpointError: It could not be fetched; one line with the cause.
    """
    from huggingface_hub import snapshot_download

    patterns = [p for p in _PATTERNS if not (tokenizer_only and p == "*.safetensors")]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the library raises its own, httpx's and OSError's
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"model {model!r} is not in the Hugging Face cache, and downloading it failed:"
            f" {type(error).__name__}: {cause[0]:.200}"
        ) from error
