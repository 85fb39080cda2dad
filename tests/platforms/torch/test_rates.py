import pytest
import torch

from dovetail.core.contracts.platform import Memory
from dovetail.core.errors import OutOfMemoryError, UnsupportedError
from dovetail.core.plugins.selection import load_platform
from dovetail.platforms.null import NullPlatform
from dovetail.platforms.torch import rates


@pytest.fixture
def platform(monkeypatch):
    """Small and quick."""
    monkeypatch.setattr(rates, "_LARGEST", 1 << 24)
    monkeypatch.setattr(rates, "_SMALLEST", 1 << 22)
    monkeypatch.setattr(rates, "_LONG_ENOUGH", 0.001)
    monkeypatch.setattr(rates, "_ENOUGH", 0.0)
    return load_platform("reference")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rates_are_those_of_a_machine(platform, dtype):
    found = platform.rates(dtype)
    assert 1e7 < found.read_bytes_per_second < 1e14
    assert 1e6 < found.matrix_flops_per_second < 1e16


def test_products_are_those_of_the_faster_dtype(platform, monkeypatch):
    speeds = {torch.float32: 2e11, torch.bfloat16: 1e9, torch.float16: 5e11}
    monkeypatch.setattr(rates, "_matrix_rate", lambda _, dtype: speeds[dtype])
    found = [platform.rates(name).matrix_flops_per_second for name in ("bfloat16", "float16")]
    assert found == [2e11, 5e11]


def test_arrays_fit_in_what_is_free(platform, monkeypatch):
    sizes = []
    ones = torch.ones

    def counted(*shape, **more):
        sizes.append(shape)
        return ones(*shape, **more)

    monkeypatch.setattr(torch, "ones", counted)
    monkeypatch.setattr(platform, "memory", lambda device=0: Memory(free=1 << 25, total=1 << 30))
    platform.rates("float32")
    assert sizes == [(1 << 21,)], "a quarter of the bytes that are free, in float32"


def test_the_device_s_own_waiting_is_used(platform, monkeypatch):
    waits = []
    monkeypatch.setattr(platform, "synchronize", lambda: waits.append(1))
    platform.rates("float32")
    assert len(waits) > 3 * 2 * rates._FEWEST - 1


def test_no_room_is_said(platform, monkeypatch):
    def full(*shape, **more):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(OutOfMemoryError, match="no room to measure"):
        platform.rates("float32")


def test_wrong_dtypes_and_platforms_without_rates(platform):
    with pytest.raises(UnsupportedError, match="no dtype 'int3'"):
        platform.rates("int3")
    with pytest.raises(UnsupportedError, match="platform null does not measure"):
        NullPlatform().rates("float32")
