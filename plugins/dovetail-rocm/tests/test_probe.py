"""What the probe says of the kernel's driver, builds of torch and switches. No GPU is needed."""

from __future__ import annotations

from pathlib import Path

import dovetail_rocm
import pytest

from dovetail.core.contracts.platform import ProbeResult
from dovetail.platforms.gpu.build import TorchBuild

ROCM = TorchBuild(version="2.11.0+rocm7.0", cuda=None, hip="7.0.51831")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nodes of a machine with one processor and two GPUs, and the device file."""
    for name, version in (("0", 0), ("1", 90402), ("2", 90010)):
        node = tmp_path / "nodes" / name
        node.mkdir(parents=True)
        lines = f"cpu_cores_count 8\ngfx_target_version {version}\nvendor_id 4098\n"
        (node / "properties").write_text(lines)
    (tmp_path / "nodes" / "3").mkdir()  # one that may not be read
    (tmp_path / "kfd").touch()
    monkeypatch.setattr(dovetail_rocm, "_NODES", tmp_path / "nodes")
    monkeypatch.setattr(dovetail_rocm, "_DEVICE", tmp_path / "kfd")
    monkeypatch.setattr(dovetail_rocm, "torch_build", lambda: ROCM)
    monkeypatch.delenv("DOVETAIL_ROCM_SIMULATE", raising=False)
    return tmp_path


def test_gpus_are_named_and_counted(machine: Path) -> None:
    result = dovetail_rocm.PLUGIN.probe()
    assert result == ProbeResult(
        usable=True, reason="gfx942, gfx90a; ROCm 7.0.51831", num_devices=2
    )


def test_versions_are_names_of_instruction_sets(machine: Path) -> None:
    properties = machine / "nodes" / "1" / "properties"
    for version, name in ((90500, "gfx950"), (110000, "gfx1100"), (120001, "gfx1201")):
        properties.write_text(f"gfx_target_version {version}\n")
        assert dovetail_rocm.gpu_targets(machine / "nodes") == [name, "gfx90a"]


def test_what_is_missing_is_said(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        result = dovetail_rocm.PLUGIN.probe()
        assert not result.usable
        return result.reason

    (machine / "kfd").unlink()
    assert "is not there: in a container" in reason()
    monkeypatch.setattr(dovetail_rocm, "_NODES", machine / "none")
    assert "no AMD GPU" in reason()
    other = TorchBuild(version="2.13.0+cpu", cuda=None, hip=None)
    monkeypatch.setattr(dovetail_rocm, "torch_build", lambda: other)
    assert "2.13.0+cpu is not built for ROCm" in reason()
    monkeypatch.setattr(dovetail_rocm, "torch_build", lambda: None)
    assert "torch is not installed" in reason()


def test_simulation_is_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOVETAIL_ROCM_SIMULATE", "1")
    result = dovetail_rocm.PLUGIN.probe()
    assert result.usable and "simulated on the CPU" in result.reason
