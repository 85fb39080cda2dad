"""What the reports of benchmarks share: how rates are said, and where results go."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["machine_line", "rates_text", "row", "show_report", "write_report"]


def machine_line(machine: Mapping[str, str]) -> str:
    """What the measurement was made on."""
    return f"Machine: {'; '.join(f'{key} {value}' for key, value in machine.items())}."


def rates_text(rates: Mapping[str, Any]) -> str:
    """From a mapping that has the fields of ``Rates``."""
    read, products = (rates[f"{key}_per_second"] for key in ("read_bytes", "matrix_flops"))
    return f"reads {read / 1e9:,.0f} GB/s and multiplies at {products / 1e12:,.1f} TFLOP/s"


def row(cells: Sequence[str]) -> str:
    """Of a table in Markdown."""
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def write_report(
    folder: Path, text: str, machine: Mapping[str, str], result: Mapping[str, Any]
) -> None:
    """``result.md``, and ``result.json`` with the date and the machine."""
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    (folder / "result.md").write_text(text)
    whole = {"date": date, "machine": machine, **result}
    (folder / "result.json").write_text(json.dumps(whole, indent=2) + "\n")


def show_report(folder: Path, text: str) -> None:
    """To whoever waits for it."""
    print(f"\n{text}\nWritten to {folder}")
