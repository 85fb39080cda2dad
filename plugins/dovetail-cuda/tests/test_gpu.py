"""What needs a GPU and is not in the conformance kit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dovetail.core.errors import UnsupportedError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_a_group_of_one_keeps_its_arrays_on_the_gpu(tmp_path: Path) -> None:
    from dovetail.core.plugins.selection import load_platform

    group = load_platform("cuda").communicator(0, 1, str(tmp_path / "meeting"))
    x = torch.arange(6, dtype=torch.bfloat16, device="cuda").view(3, 2).t()
    found = [
        group.all_reduce(x),
        group.all_gather(x, 1),
        group.reduce_scatter(x, 0),
        group.broadcast(x, 0),
    ]
    group.barrier()
    group.close()
    for out in found:
        assert out.device == x.device
        assert torch.equal(out, x)
        assert out.data_ptr() != x.data_ptr()


def test_members_do_not_share_a_gpu(tmp_path: Path) -> None:
    from dovetail.core.plugins.selection import load_platform

    count = torch.cuda.device_count()
    with pytest.raises(UnsupportedError, match=f"{count + 1} members need a GPU each"):
        load_platform("cuda").communicator(0, count + 1, str(tmp_path / "meeting"))
