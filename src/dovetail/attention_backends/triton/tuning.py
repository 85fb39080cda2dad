"""Sizes of tiles, warps, stages and parts: data, in ``tuning.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["HEAD_SIZES", "KINDS", "Tile", "Tuning", "architectures", "kind_of"]

HEAD_SIZES = (64, 128, 256)
"""The table's classes of head sizes: each size belongs to the first that is not smaller."""
KINDS = ("half", "coded", "float", "float_coded")
"""The table's classes of dtypes."""
_DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One launch of ``prefill`` or ``decode``; see the head of the table."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The table as one architecture sees it."""

    native_e4m3: bool
    programs: int
    """Programs per multiprocessor that decoding aims at."""
    most_parts: int
    """Parts of one row, at most: a power of two."""
    write_heads: int
    write_warps: int
    tiles: Mapping[tuple[str, int, str], Tile]
    """By kernel, class of head sizes and class of dtypes."""

    @classmethod
    def of(cls, architecture: str) -> Tuning:
        """The entries of an architecture; those of ``default`` where the table does not know it."""
        merged: dict[str, Any] = {}
        for name in reversed(_ancestry(architecture)):
            merged = _merged(merged, _table()[name])
        return cls(
            native_e4m3=merged["native_e4m3"],
            programs=merged["splits"]["programs"],
            most_parts=merged["splits"]["most"],
            write_heads=merged["write"]["heads"],
            write_warps=merged["write"]["warps"],
            tiles={
                (kernel, int(size), kind): Tile(**values)
                for kernel in ("prefill", "decode")
                for size, kinds in merged[kernel].items()
                for kind, values in kinds.items()
            },
        )

    def tile(self, kernel: str, head_size: int, kind: str) -> Tile:
        """How to launch a kernel; ``kind`` is one of ``KINDS``."""
        size = next(size for size in HEAD_SIZES if head_size <= size)
        return self.tiles[kernel, size, kind]


def kind_of(*, floats: bool, coded: bool) -> str:
    """The class of float32 or 16-bit queries over a cache of one byte per entry, or another."""
    return KINDS[2 * floats + coded]


def architectures() -> tuple[str, ...]:
    """All that the table names."""
    return tuple(_table())


@cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    return tomllib.loads(Path(__file__).with_name("tuning.toml").read_text("utf-8"))


def _ancestry(architecture: str) -> list[str]:
    """The architecture, what it is like, and the default."""
    found, name = [], architecture
    while name in _table():
        found.append(name)
        name = _table()[name].get("like", _DEFAULT if name != _DEFAULT else "")
    return found or [_DEFAULT]


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` where it says something; tables are merged, launches and splits replaced."""
    merged = dict(below)
    for name, value in above.items():
        known = merged.get(name)
        deep = isinstance(value, Mapping) and isinstance(known, Mapping)
        whole = isinstance(value, Mapping) and set(value) <= _LEAVES
        merged[name] = _merged(known, value) if deep and known and not whole else value
    return merged


_LEAVES = {field.name for field in fields(Tile)} | {"programs", "most", "heads"}
