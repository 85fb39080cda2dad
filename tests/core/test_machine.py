"""What the machine has, over made-up files of the kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dovetail.core.machine import Machine, look_at_machine

GIB = 1 << 30


def machine(tmp_path: Path, cgroup: str = "", **files: str) -> Machine:
    """A machine of 16 GiB, 12 of them free; ``files`` are of control groups, ``__`` for ``/``."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    meminfo = f"MemTotal: {16 << 20} kB\nMemFree: 1 kB\nMemAvailable: {12 << 20} kB\n"
    (proc / "meminfo").write_text(meminfo)
    (proc / "cpuinfo").write_text("processor: 0\nmodel name : Acme 9000\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        file = groups / name.replace("__", "/").replace("_max", ".max").replace("_cur", ".current")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return look_at_machine({"OMP_NUM_THREADS": "2", "X": "y"}, root=tmp_path, groups=groups)


def test_without_a_control_group(tmp_path: Path) -> None:
    found = machine(tmp_path)
    assert (found.memory_total, found.memory_free) == (16 * GIB, 12 * GIB)
    assert (found.memory_limit, found.core_quota) == (None, None)
    assert found.processor == "Acme 9000"
    assert 1 <= found.num_cores <= found.num_processors <= found.num_processors_total
    assert found.num_threads == found.num_cores
    assert found.num_nodes == 1
    assert found.threads == {"OMP_NUM_THREADS": "2"}


def test_the_limit_of_the_control_group(tmp_path: Path) -> None:
    found = machine(tmp_path, memory_max=str(4 * GIB), memory_cur=str(GIB))
    assert (found.memory_limit, found.memory_free) == (4 * GIB, 3 * GIB)


def test_a_group_without_a_limit(tmp_path: Path) -> None:
    found = machine(tmp_path, memory_max="max\n", memory_cur=str(GIB))
    assert (found.memory_limit, found.memory_free) == (None, 12 * GIB)


def test_the_tightest_of_the_groups_that_the_process_lies_in(tmp_path: Path) -> None:
    found = machine(
        tmp_path,
        cgroup="0::/outer/inner\n",
        outer__inner__memory_max=str(8 * GIB),
        outer__inner__memory_cur=str(GIB),
        outer__memory_max=str(2 * GIB),
        outer__memory_cur=str(GIB),
        outer__cpu_max="150000 100000\n",
    )
    assert (found.memory_limit, found.memory_free) == (2 * GIB, GIB)
    assert found.core_quota == 1.5
    assert found.num_threads == 1


@pytest.mark.parametrize(
    ("processors", "siblings", "num_cores"),
    [
        ({0, 1, 2, 3}, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, 2),
        ({1, 2, 3}, {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, 2),
        ({0, 1, 2}, {0: "0", 1: "1", 2: "2"}, 3),
        ({0, 1, 2}, {}, 3),
    ],
)
def test_threads_of_one_core_are_counted_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processors: set[int],
    siblings: dict[int, str],
    num_cores: int,
) -> None:
    for number, text in siblings.items():
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: processors, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    found = machine(tmp_path)
    assert (found.num_processors, found.num_processors_total) == (len(processors), 4)
    assert found.num_cores == found.num_threads == num_cores


@pytest.mark.parametrize(
    ("processors", "num_nodes"), [({0, 1, 4}, 1), ({1, 2}, 2), ({2, 5, 6}, 1), ({0, 7}, 2)]
)
def test_nodes_that_the_process_may_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processors: set[int], num_nodes: int
) -> None:
    for node, ranges in {0: "0-1,4\n", 1: "2-3,5-7\n", 2: "\n"}.items():  # the last: memory only
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(ranges)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: processors, raising=False)
    assert machine(tmp_path).num_nodes == num_nodes


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    folder = tmp_path / "groups" / "memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(GIB))
    (folder / "memory.usage_in_bytes").write_text(str(2 * GIB))
    (tmp_path / "groups" / "cpu").mkdir()
    (tmp_path / "groups" / "cpu" / "cpu.cfs_quota_us").write_text("250000\n")
    (tmp_path / "groups" / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    found = machine(tmp_path)
    assert (found.memory_limit, found.memory_free) == (GIB, 0)
    assert found.core_quota == 2.5
