"""How much memory this process may still take: the machine's, or the control group's if less."""

from __future__ import annotations

import os
from pathlib import Path

from dovetail.core.contracts.platform import Memory

__all__ = ["host_memory"]

_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
_KEPT_FREE = 0.08
"""Share of all memory that is left to the rest of the machine."""


def host_memory() -> Memory:
    """Bytes that can be taken, page cache included, less a share for everybody else."""
    total, free = _machine()
    for limit_file, usage_file in _GROUPS:
        limit, usage = _number(limit_file), _number(usage_file)
        if limit is not None and usage is not None and limit < total:
            total, free = limit, min(free, max(0, limit - usage))
    return Memory(free=max(0, free - int(_KEPT_FREE * total)), total=total)


def _machine() -> tuple[int, int]:
    """(total, available) of the machine."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        sizes = {key: int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable")}
        return sizes["MemTotal"], sizes["MemAvailable"]
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    return total, total // 2


def _number(path: str) -> int | None:
    """The number in a file; None if there is no such file, or no limit in it."""
    file = Path(path)
    if not file.exists():
        return None
    text = file.read_text().strip()
    return int(text) if text.isdigit() else None
