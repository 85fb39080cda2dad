"""A model folder's safetensors files as one set of tensors, single or sharded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.core.errors import CheckpointError
from dovetail.core.models.shard import Shard

__all__ = ["Checkpoint", "Place", "open_checkpoint"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_LAYOUTS = ("adapter", "consolidated", "optimizer")
"""Starts of names of safetensors files that hold something else than the model's tensors."""

Place = tuple[Shard, str]
"""A file, and the name of a tensor in it."""


class Checkpoint:
    """Tensors of safetensors files, by name. Arrays are views into the files: nothing is copied."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        entries = {name: shard.entries[stored] for name, (shard, stored) in places.items()}
        self._places = dict(places)
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        self.total_bytes = sum(entry.num_bytes for entry in entries.values())

    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        """A read-only view. Raises CheckpointError if there is no such tensor."""
        shard, stored = self._place(name)
        return shard.tensor(stored)

    def read_ahead(self, name: str) -> None:
        """Start reading a tensor that will be wanted soon, without waiting. Only a hint."""
        shard, stored = self._place(name)
        shard.read_ahead(stored)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same tensors; those that are keys of ``names`` go by its values."""
        return Checkpoint({names.get(name, name): place for name, place in self._places.items()})

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise CheckpointError(f"The checkpoint has no tensor {name!r}.")
        return self._places[name]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a folder's safetensors files; data are mapped when they are wanted.

    Raises:
        CheckpointError: There is no such folder, it has no safetensors files, one of them is
            missing or broken, or a tensor is in two of them.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that has config.json.")
    if (folder / SINGLE).is_file():
        return _gather([folder / SINGLE])
    if (folder / INDEX).is_file():
        return _indexed(folder)
    files = sorted(
        file for file in folder.glob("*.safetensors") if not file.name.startswith(OTHER_LAYOUTS)
    )
    if not files:
        raise _no_safetensors(folder)
    return _gather(files)


def _gather(files: Iterable[Path]) -> Checkpoint:
    places: dict[str, Place] = {}
    for shard in map(Shard, files):
        for name in shard.entries:
            if name in places:
                raise CheckpointError(
                    f"{name!r} is in both {places[name][0].path} and {shard.path}; "
                    "move the files that do not belong to the model elsewhere."
                )
            places[name] = (shard, name)
    return Checkpoint(places)


def _indexed(folder: Path) -> Checkpoint:
    file_of = _weight_map(folder / INDEX)
    files = sorted(set(file_of.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(files)} weight files: "
            f"{', '.join(missing[:10])}. Download the checkpoint again."
        )
    checkpoint = _gather(folder / name for name in files)
    absent = [name for name in file_of if name not in checkpoint.shapes]
    if absent:
        raise CheckpointError(
            f"{folder / INDEX} names {len(absent)} tensors that its files do not hold: "
            f"{', '.join(absent[:10])}. Download the checkpoint again."
        )
    return checkpoint


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not valid JSON: {error!s:.80}.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor to file name.")
    for name in weight_map.values():
        # A path could lead out of the model's folder.
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names the file {name!r:.80}, which is not a file name.")
    return weight_map


def _no_safetensors(folder: Path) -> CheckpointError:
    names = sorted(file.name for file in folder.iterdir())
    found = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in names):
        advice = (
            "Pickled weights can run code, so they are not read; convert them once: python -c "
            '"from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    else:
        advice = f"Expected {SINGLE}, or {INDEX} and its files."
    return CheckpointError(f"{folder} has no safetensors files, only: {found}. {advice}")
