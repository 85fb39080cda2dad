from __future__ import annotations

import torch

from dovetail.core.plugins.selection import load_platform


def test_an_op_counts_once_for_each_set_of_shapes() -> None:
    with load_platform("cpu").watch() as activity, torch.inference_mode():
        for size in (3, 3, 4):
            torch.ones(size).neg()
    assert activity.shapes == {
        ("aten.neg.default", (((size,), "torch.float32"),)) for size in (3, 4)
    }
    assert (activity.to_device, activity.to_host) == (0, 0)


def test_nothing_counts_afterwards() -> None:
    with load_platform("cpu").watch() as activity:
        pass
    torch.ones(3).neg()
    assert not activity.shapes


def test_copies_between_devices_count_in_their_direction() -> None:
    from dovetail.platforms.torch.watch import watch

    # The only other device that is everywhere keeps no values, so it can be copied to, not from.
    with watch(torch.device("meta")) as activity:
        there = torch.ones(3).to("meta")
        there.copy_(torch.zeros(3))
        there.clone()
    assert (activity.to_device, activity.to_host) == (2, 0)
    assert [name for name, _ in activity.shapes].count("aten.clone.default") == 1
