"""FlashInfer's own wrappers, where it is installed, over plain torch in place of its kernels.

Needs no GPU: ``pip install flashinfer-python``, then this file. The stand-ins take what the
wrappers of flashinfer-python 0.7.2 give to compiled modules.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from dovetail_cuda.flashinfer import FlashInferAttention
from torch import Tensor

from dovetail.attention_backends.reference import ReferenceAttention
from tests.attention_backends.sequences import Sequences, make_need, make_spec

CPU = torch.device("cpu")
SPECS: dict[str, dict[str, Any]] = {
    "groups of two": {},
    "groups of seven, on tensor cores": {"heads": 7, "kv_heads": 1},
    "window": {"window": 20},
    "window and soft cap": {"window": 60, "soft_cap": 2.0},
}


def compute(
    q: Tensor,
    caches: Sequence[Tensor],
    starts: Sequence[int],
    tables: Sequence[Tensor],
    out: Tensor,
    **mask: Any,
) -> None:
    from tests.attention_backends.emulated import attend, gathered

    indptr, indices, last = tables
    for i, (first, end) in enumerate(itertools.pairwise(starts)):
        pages = indices[int(indptr[i]) : int(indptr[i + 1])]
        length = (len(pages) - 1) * caches[0].shape[1] + int(last[i])
        rows = (gathered(side, pages, length) for side in caches)
        out[first:end] = attend(q[first:end], *rows, **mask)


class Decode:
    """Decoding without tensor cores."""

    workspace_size = None

    def plan(
        self, partial: Tensor, room: Tensor, pinned: Tensor, indptr: Tensor, *more: Any
    ) -> Any:
        assert len(room) == len(pinned) and indptr.dtype == torch.int32
        return [len(indptr)]

    def run(self, *arguments: Any) -> None:
        _, _, _, q, k, v, *tables, out, _, _, left, _, _, cap, scale, _, _ = arguments
        mask = {"scale": scale, "causal": False, "left": left, "cap": cap}
        compute(q, (k, v), range(len(q) + 1), tables, out, **mask)


class Prefill:
    """Prompts, and decoding on tensor cores."""

    workspace_size = None

    def plan(self, partial: Tensor, room: Tensor, pinned: Tensor, *more: Any) -> Any:
        queries, indptr, lens, _, rows = more[:5]
        assert len(room) == len(pinned) and len(queries) == len(indptr) == len(lens) + 1 == rows + 1
        return [rows]

    def paged_run(self, *arguments: Any) -> None:
        q, k, v, starts, *tables, out = arguments[3:11]
        mode, left, cap, scale = (arguments[place] for place in (12, 14, 22, 23))
        mask = {"scale": scale, "causal": mode == 1, "left": left, "cap": cap}
        compute(q, (k, v), starts.tolist(), tables, out, **mask)


@pytest.fixture(params=["fa2", "fa3"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed package; the host's memory counts as pinned."""
    pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    from flashinfer import decode, prefill

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **more: empty(*a, **more))
    monkeypatch.setattr(decode, "get_batch_decode_module", lambda *_: Decode())
    for module in (decode, prefill):
        monkeypatch.setattr(module, "get_batch_prefill_module", lambda *_: Prefill())
    monkeypatch.setattr(prefill, "determine_attention_backend", lambda *_, **more: request.param)
    name = "_eagle_verify_fp8kv_sm90_prepare"
    monkeypatch.setattr(prefill, name, lambda *_, **more: None, raising=False)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", SPECS)
def test_values_are_those_of_the_reference(name: str) -> None:
    spec = make_spec(size=64, **SPECS[name])
    need = make_need(spec, dtype="float16", kv_dtype="float16")
    made = FlashInferAttention(CPU, (9, 0))
    assert made.refuses(need) is None
    work = Sequences(spec, need, (1, 5, 16, 17, 70))
    want = work.run(ReferenceAttention(CPU), work.whole())
    for steps in (work.whole(), work.one_by_one(), work.mixed()):
        for a, b in zip(work.run(made, steps), want, strict=True):
            assert torch.allclose(a.float(), b.float(), atol=2e-3)
