"""The machine that this process runs on: cores, memory, threads. Standard library only."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["THREAD_VARIABLES", "Machine", "look_at_machine"]

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "GOMP_CPU_AFFINITY",
    "GOMP_SPINCOUNT",
)
"""Variables that the libraries which compute on the host's cores read."""

_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the machine has and this process may use."""

    system: str
    """Operating system and architecture."""
    processor: str
    num_processors: int
    """What the process may run on, as the system counts: the threads of a core one by one."""
    num_processors_total: int
    num_cores: int
    """Cores that those belong to."""
    num_nodes: int
    """NUMA nodes that those lie on: each reads its own memory faster than the others'."""
    core_quota: float | None
    """Cores' worth of time that the control group allows; None: no limit."""
    memory_total: int
    """Bytes of the machine."""
    memory_free: int
    """Bytes that can be had, page cache included, within the control group's limit."""
    memory_limit: int | None
    """Bytes that the control group allows; None: no limit below the machine's."""
    threads: dict[str, str]
    """The thread variables that are set."""

    @property
    def num_threads(self) -> int:
        """Threads to compute with: one for each core, and no more than may run at a time.

        Two on a core share its arithmetic; more than the control group allows are all stopped
        together until its next period.
        """
        quota = self.num_cores if self.core_quota is None else int(self.core_quota)
        return max(1, min(self.num_cores, quota))


def look_at_machine(
    environ: Mapping[str, str] = os.environ, *, root: Path = Path("/"), groups: Path = _GROUPS
) -> Machine:
    """Look at the machine now.

    Args:
        environ: Where the thread variables are looked up.
        root: Where ``proc`` and ``sys`` are.
        groups: Where the control groups are mounted.
    """
    total, free = _memory(root / "proc/meminfo")
    limit = None
    for most, used in _limits(root, groups):
        if most < total:
            limit = most if limit is None else min(limit, most)
            free = min(free, max(0, most - used))
    total_processors = os.cpu_count() or 1
    affinity = getattr(os, "sched_getaffinity", None)
    processors = affinity(0) if affinity else range(total_processors)
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        processor=_processor(root / "proc/cpuinfo"),
        num_processors=len(processors),
        num_processors_total=total_processors,
        num_cores=_num_cores(root / "sys/devices/system/cpu", processors),
        num_nodes=_num_nodes(root / "sys/devices/system/node", processors),
        core_quota=_quota(root, groups),
        memory_total=total,
        memory_free=free,
        memory_limit=limit,
        threads={name: environ[name] for name in THREAD_VARIABLES if name in environ},
    )


def _memory(meminfo: Path) -> tuple[int, int]:
    """(total, available) bytes of the machine."""
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total, free = (int(lines[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
        return total, free
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    return total, total // 2


def _limits(root: Path, groups: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of the process's control group and of each that it lies in."""
    for group in _lineage(root, groups):
        most, used = _number(group / "memory.max"), _number(group / "memory.current")
        if most is not None and used is not None:
            yield most, used
    older = groups / "memory"
    most = _number(older / "memory.limit_in_bytes")
    used = _number(older / "memory.usage_in_bytes")
    if most is not None and used is not None:
        yield most, used


def _num_cores(folder: Path, processors: Iterable[int]) -> int:
    """Processors that name the same siblings are threads of one core."""
    siblings = (_text(folder / f"cpu{i}/topology/thread_siblings_list") for i in processors)
    return len({text or f"processor {i}" for i, text in enumerate(siblings)})


def _num_nodes(folder: Path, processors: Iterable[int]) -> int:
    """One where the system does not tell."""
    owners = (_processors(_text(file)) for file in folder.glob("node[0-9]*/cpulist"))
    return max(1, sum(not owned.isdisjoint(processors) for owned in owners))


def _processors(ranges: str) -> set[int]:
    """Of a list such as ``0-3,8``."""
    found: set[int] = set()
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return found


def _quota(root: Path, groups: Path) -> float | None:
    """The smallest share of time on its way up, in cores."""
    limits = [_text(group / "cpu.max").split() for group in _lineage(root, groups)]
    limits.append([_text(groups / f"cpu/cpu.cfs_{name}_us") for name in ("quota", "period")])
    shares = [
        int(quota) / int(period)
        for quota, period in (limit for limit in limits if len(limit) == 2)
        if quota.strip().isdigit() and period.strip().isdigit()
    ]
    return min(shares, default=None)


def _lineage(root: Path, groups: Path) -> Iterator[Path]:
    """The folder of the process's control group (version 2), and those above it."""
    own = ""
    for line in _text(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            own = line.removeprefix("0::").strip("/")
    folder = groups / own
    yield folder
    if own:
        yield from (parent for parent in folder.parents if parent.is_relative_to(groups))


def _processor(cpuinfo: Path) -> str:
    for line in _text(cpuinfo).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    """What a file holds; nothing if it is not there or may not be read."""
    try:
        return file.read_text()
    except OSError:
        return ""
