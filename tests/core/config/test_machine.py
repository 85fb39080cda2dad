"""What the machine has, over made-up files of the kernel."""

from __future__ import annotations

from pathlib import Path

from dovetail.core.config.machine import Machine, look_at_machine

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
    assert 1 <= found.num_cores <= found.num_cores_total
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


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    folder = tmp_path / "groups" / "memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(GIB))
    (folder / "memory.usage_in_bytes").write_text(str(2 * GIB))
    found = machine(tmp_path)
    assert (found.memory_limit, found.memory_free) == (GIB, 0)
