"""The emulated device alone: what it computes is the host's, what it refuses is a device's."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dovetail_sim.device import Faults, Hardware
from dovetail_sim.device.storage import Storages
from torch import Tensor
from torch.nn import functional

from dovetail.core.errors import ConfigError

SIM = "sim:0"
SO_LARGE = 10 << 20
"""Numbers that lie in pages of their own, which the system takes back and soon gives out again."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_place(x: Tensor) -> Tensor:
    x[1:3] += 2
    x[x > 1] = 0.5
    return x.mul_(3).clamp_(max=1)


def into_empty(x: Tensor) -> Tensor:
    out = torch.empty(0, device=x.device)
    torch.mul(x, 2, out=out)
    return out


def written_by_index(x: Tensor) -> Tensor:
    index = torch.tensor([3, 0], device=x.device)
    x.T[index] = x.T[index] * 2
    return x


WORK: dict[str, Callable[[Tensor], Any]] = {
    "products": lambda x: x @ x.T,
    "views": lambda x: x.view(2, 4, 8)[:, 1:].transpose(1, 2).flatten(1).unfold(1, 4, 2),
    "another dtype": lambda x: x.view(torch.int32).bitwise_and(255).to(torch.bfloat16),
    "numbers": lambda x: torch.where(x > 0, x.double(), 0.1) ** 2 + ((x > 1) ^ True),
    "in place": in_place,
    "out=": into_empty,
    "index": written_by_index,
    "gather": lambda x: x.gather(1, x.argsort(1)),
    "embedding": lambda x: functional.embedding(torch.tensor([5, 0], device=x.device), x),
    "attention": lambda x: functional.scaled_dot_product_attention(x[None], x[None], x[None]),
    "norm": lambda x: functional.rms_norm(x, (8,)),
    "several results": lambda x: torch.cat(x.topk(3)[0].split(2)),
    "padding": lambda x: functional.pad(x, (0, 1, 2, 0)),
    "factories": lambda x: x + torch.arange(8, device=x.device) + torch.ones(8, device=x.device),
}


@pytest.mark.parametrize("name", WORK)
def test_results_are_the_hosts(name: str, device: Hardware) -> None:
    x = draw(8, 8)
    got, want = WORK[name](x.clone().to(SIM)), WORK[name](x.clone())
    assert str(got.device) == SIM
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.equal(got.cpu(), want)


def test_memory_is_counted_limited_and_given_back(device: Hardware) -> None:
    gc.collect()
    memory, before = device.memory[0], device.memory[0].used
    x = draw(1024).to(SIM)
    assert memory.used == before + 4096
    view = x[10:]
    assert memory.used == before + 4096, "a view takes none"
    del x
    assert memory.used == before + 4096, "its view needs it"
    with pytest.raises(torch.OutOfMemoryError, match=r"sim:0 is out of memory: .* were asked for"):
        torch.empty(device.limit, device=SIM)
    del view
    gc.collect()
    assert memory.used == before


def test_memory_that_a_resized_array_left_may_be_anothers(device: Hardware) -> None:
    # An out= that is too small is given other memory by the host, whose allocator hands the first
    # out again while the device's array is still there.
    gc.collect()
    storages, before = Storages(device), device.memory[0].used
    first = storages.adopt(torch.zeros(SO_LARGE), 0)
    left = first.untyped_storage().data_ptr()
    storages.alias(first).resize_(2 * SO_LARGE)
    tried: list[Tensor] = []
    while not tried or tried[-1].data_ptr() != left:
        assert len(tried) < 50, "the system never gave it out again"
        tried.append(torch.empty(SO_LARGE))
    second = storages.adopt(tried.pop().fill_(1), 0)
    del first
    assert storages.alias(second).min() == 1
    del second, tried
    gc.collect()
    assert device.memory[0].used == before


def test_copies_are_counted_in_each_direction(device: Hardware) -> None:
    counters = device.counters
    before = [(t.copies, t.num_bytes) for t in (counters.to_device, counters.to_host)]
    x = draw(100).to(SIM)
    assert (x + x).sum().item() == pytest.approx(2 * draw(100).sum().item(), rel=1e-5)
    x.cpu()
    after = [(t.copies, t.num_bytes) for t in (counters.to_device, counters.to_host)]
    changes = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(after, before, strict=True)]
    assert changes == [(1, 400), (2, 404)]


def test_ops_are_known_by_their_shapes(device: Hardware) -> None:
    def new(work: Callable[[], Any]) -> int:
        before = len(device.counters.signatures)
        work()
        return len(device.counters.signatures) - before

    x, y = torch.ones(37, 3, device=SIM), torch.ones(37, 3, device=SIM)
    assert new(lambda: x.atan2(y)) == 1
    assert new(lambda: y.atan2(x)) == 0
    assert new(lambda: x[1:].atan2(y[1:])) == 1
    assert new(lambda: x[:1]) == 0, "a view is no op"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64])
def test_a_late_copy_is_poison_until_it_arrives(dtype: torch.dtype, device: Hardware) -> None:
    value = torch.arange(4).to(dtype)
    x, target = value.to(SIM), torch.zeros(4, dtype=dtype)
    target.copy_(x, non_blocking=True)
    x.add_(1)
    assert not (target == value).any()
    assert bool(target.isnan().all()) == dtype.is_floating_point
    device.synchronize()
    assert torch.equal(target, value), "what was there when the copy was ordered"


def test_arrays_of_several_devices_are_refused(device: Hardware) -> None:
    x = torch.ones(3, device=SIM)
    assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2], "a number goes anywhere"
    with pytest.raises(RuntimeError, match="device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match=r"arrays of several devices: cpu, sim:0"):
        x.take(torch.tensor([1]))


def test_there_are_as_many_devices_as_were_asked_for(device: Hardware) -> None:
    with pytest.raises(RuntimeError, match=r"no sim:7; there are 1 devices"):
        torch.empty(3, device="sim:7")


def test_what_is_ordered_fails(device: Hardware) -> None:
    x = torch.ones(4, device=SIM)
    device.faults.unsupported = {"aten.silu"}
    with pytest.raises(NotImplementedError, match=r"aten\.silu is not supported"):
        functional.silu(x)
    device.faults.clear()
    functional.silu(x)
    device.faults.fail_op(2, times=2)
    x.add_(1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="as was ordered"):
            x.add_(1)
    x.add_(1)
    assert x.tolist() == [3, 3, 3, 3]
    device.faults.fail_allocation(2)
    y = x + 1
    with pytest.raises(torch.OutOfMemoryError, match="as was ordered"):
        y + 1


def test_faults_and_sizes_are_read_from_the_environment() -> None:
    environ = {
        "DOVETAIL_SIM_MEMORY": "4096",
        "DOVETAIL_SIM_DEVICES": "2",
        "DOVETAIL_SIM_FAULTS": "unsupported=aten.topk, aten.sort; op=1",
    }
    made = Hardware.from_environ(environ)
    assert (made.limit, len(made.memory)) == (4096, 2)
    assert made.faults.unsupported == {"aten.topk", "aten.sort"}
    with pytest.raises(RuntimeError, match="as was ordered"):
        made.faults.before_op("aten.add")
    made.take(1, 4096)
    with pytest.raises(torch.OutOfMemoryError, match="sim:1"):
        made.take(1, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DOVETAIL_SIM_MEMORY", "1G"),
        ("DOVETAIL_SIM_DEVICES", "0"),
        ("DOVETAIL_SIM_FAULTS", "op=first"),
        ("DOVETAIL_SIM_FAULTS", "ops=1"),
    ],
)
def test_what_makes_no_sense_is_an_error(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Hardware.from_environ({name: value})


def test_nothing_fails_that_was_not_ordered() -> None:
    faults = Faults()
    for _ in range(3):
        assert faults.before_op("aten.add") is None
        assert faults.before_allocation(1) is None
