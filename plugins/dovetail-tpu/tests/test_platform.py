"""The probe, the switch and what the platform says of itself."""

from __future__ import annotations

import os
import subprocess
import sys

import dovetail_tpu
import numpy as np
import pytest

from dovetail.core.errors import ConfigError, UnsupportedError
from dovetail.core.plugins.selection import load_platform


def test_the_probe_imports_no_framework_and_says_what_to_do() -> None:
    code = (
        "import sys, dovetail_tpu; r = dovetail_tpu.PLUGIN.probe();"
        "print(r.usable, r.num_devices, 'jax' in sys.modules, r.reason,"
        " sorted(dovetail_tpu.PLUGIN.environment.items()))"
    )
    expected = {
        "": ("False 0 False", "set DOVETAIL_TPU_SIMULATE=8"),
        "4": ("True 4 False", "simulated on the CPU with 4 devices"),
        "many": ("False 0 False", "must be a number of devices"),
    }
    for value, (start, reason) in expected.items():
        environ = {**os.environ, dovetail_tpu.SIMULATE: value}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(start)
        assert reason in done.stdout
        if value == "4":
            assert "('JAX_NUM_CPU_DEVICES', '4'), ('JAX_PLATFORMS', 'cpu')" in done.stdout


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_the_switch_is_a_number(value: str) -> None:
    with pytest.raises(ConfigError, match="must be a number of devices"):
        dovetail_tpu.num_simulated({dovetail_tpu.SIMULATE: value})


def test_simulation_is_said(caplog: pytest.LogCaptureFixture) -> None:
    platform = load_platform("tpu")
    assert "simulated on the CPU with 8 devices" in caplog.text
    assert platform.device_names() == [f"TPU {i}, simulated on the CPU" for i in range(8)]
    memory = platform.memory()
    assert 0 < memory.free <= memory.total
    assert [backend.name for backend in platform.attention_backends()] == ["xla", "pallas"]


def test_there_are_no_collectives_between_processes() -> None:
    with pytest.raises(UnsupportedError, match="no collectives between processes"):
        load_platform("tpu").communicator(0, 2, "nowhere")


def test_the_workbench_keeps_dtypes_and_counts() -> None:
    import ml_dtypes

    platform = load_platform("tpu")
    bench = platform.workbench()
    with platform.watch() as activity:
        for dtype in (np.int64, np.float32, ml_dtypes.bfloat16, np.int8):
            array = np.arange(6).astype(dtype).reshape(2, 3)
            held = bench.put(array)
            back = bench.get(held)
            assert back.dtype == array.dtype and (back == array).all()
            assert bench.num_bytes(held) == array.nbytes
    assert (activity.to_device, activity.to_host) == (4, 4)
    x, w, b = (np.ones(shape, np.float32) for shape in ((2, 3), (4, 3), (4,)))
    layer = bench.bind_linear(bench.put(w), bench.put(b))
    assert (bench.get(bench.ops.linear(bench.put(x), layer)) == 4).all()
