from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

SIZE = 3


def _member(rank: int, address: str, results: Any) -> None:
    from dovetail.core.plugins.selection import load_platform

    group = load_platform("reference").communicator(rank, SIZE, address)
    out = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        x = (torch.arange(12).reshape(6, 2).t() * (rank + 1)).to(dtype)
        kept = x.clone()
        out[str(dtype)] = [
            group.all_reduce(x).float().tolist(),
            group.all_gather(x, 1).float().tolist(),
            group.reduce_scatter(x, 1).float().tolist(),
            group.broadcast(x, 2).float().tolist(),
            torch.equal(x, kept),
        ]
    try:
        group.reduce_scatter(torch.zeros(4), 0)
    except ValueError as error:
        out["uneven"] = [str(error)]
    group.barrier()
    group.close()
    results.put((rank, out))


def test_every_member_gets_what_is_due(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    address = str(tmp_path / "meeting")
    members = [
        context.Process(target=_member, args=(rank, address, results)) for rank in range(SIZE)
    ]
    for member in members:
        member.start()
    found = dict(results.get(timeout=120) for _ in members)
    for member in members:
        member.join(60)
        assert member.exitcode == 0
    base = torch.arange(12).reshape(6, 2).t().float()
    for rank in range(SIZE):
        assert "cut evenly for 3" in found[rank].pop("uneven")[0]
        for reduced, gathered, share, sent, unchanged in found[rank].values():
            assert unchanged
            assert reduced == (base * 6).tolist()
            assert gathered == torch.cat([base, base * 2, base * 3], 1).tolist()
            assert share == (base * 6)[:, 2 * rank : 2 * rank + 2].tolist()
            assert sent == (base * 3).tolist()


def test_a_group_that_does_not_come_together_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import timedelta

    from dovetail.platforms.torch import communicator

    monkeypatch.setattr(communicator, "PATIENCE", timedelta(seconds=1))
    with pytest.raises(RuntimeError):
        communicator.HostCommunicator(0, 2, str(tmp_path / "meeting"))
