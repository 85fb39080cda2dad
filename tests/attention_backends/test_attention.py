"""The portable backends: against the readable one, and each against itself on other paths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dovetail.attention_backends.invariant import InvariantAttention
from dovetail.attention_backends.reference import ReferenceAttention
from dovetail.attention_backends.sdpa import SdpaAttention
from dovetail.core.buckets import Buckets
from dovetail.core.conformance.sequences import Sequences as Padded
from dovetail.core.plugins.selection import load_platform
from tests.attention_backends.sequences import Sequences, make_need, make_spec

CPU = torch.device("cpu")
LENGTHS = (1, 5, 16, 17, 100, 140)
SPECS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one KV head": {"heads": 7, "kv_heads": 1, "size": 20},
    "as many KV heads": {"heads": 3, "kv_heads": 3, "size": 24},
    "window": {"window": 20},
    "soft cap": {"soft_cap": 2.0},
    "window and soft cap": {"window": 60, "soft_cap": 5.0},
    "alibi": {"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
}


@pytest.mark.parametrize("backend", [SdpaAttention, InvariantAttention])
@pytest.mark.parametrize("path", ["whole", "one_by_one", "mixed"])
@pytest.mark.parametrize("name", SPECS)
def test_values_are_those_of_the_reference(name: str, path: str, backend: Any) -> None:
    spec = make_spec(**SPECS[name])
    need = make_need(spec)
    if backend(CPU).refuses(need):
        assert backend is SdpaAttention and name == "alibi"
        return
    work = Sequences(spec, need, LENGTHS)
    want = work.run(ReferenceAttention(CPU), work.whole())
    got = work.run(backend(CPU), getattr(work, path)())
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=3e-6)


def check_bits(name: str, dtype: str, lengths: tuple[int, ...]) -> None:
    """Every path gives the bits that a sequence gets when it is alone and in one piece."""
    spec = make_spec(**SPECS[name])
    work = Sequences(spec, make_need(spec, dtype=dtype, kv_dtype=dtype), lengths)
    want = work.run(InvariantAttention(CPU), [[(i, 0, n)] for i, n in enumerate(lengths)])
    for steps in (work.whole(), work.one_by_one(), work.mixed()):
        got = work.run(InvariantAttention(CPU), steps)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_bits_are_those_of_the_sequence_alone(name: str, dtype: str) -> None:
    check_bits(name, dtype, LENGTHS)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", ["one KV head", "soft cap"])
def test_bits_do_not_depend_on_how_threads_share_the_work(name: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_bits(name, "float32", (3, 40, 130))
    finally:
        torch.set_num_threads(before)


def test_only_the_invariant_backend_serves_deterministic_mode() -> None:
    need = make_need(make_spec(), deterministic=True)
    assert "keys" in str(ReferenceAttention(CPU).refuses(need))
    assert "kernels" in str(SdpaAttention(CPU).refuses(need))
    assert InvariantAttention(CPU).refuses(need) is None
    odd = make_need(make_spec(), deterministic=True, block_size=48)
    assert "48" in str(InvariantAttention(CPU).refuses(odd))


@pytest.mark.parametrize("backend", [SdpaAttention, InvariantAttention, ReferenceAttention])
@pytest.mark.parametrize("rows", [5, 8])
def test_padding_changes_nothing(backend: Any, rows: int) -> None:
    spec = make_spec()
    work = Padded(
        spec,
        make_need(spec),
        (1, 5, 16, 17, 45),
        buckets=Buckets(decode=(rows,), tokens=(96,), blocks=(4,)),
    )
    bench = load_platform("reference").workbench()
    for steps in (work.whole(), work.one_by_one(), work.mixed()):
        for got, want in zip(work.run(backend(CPU), bench, steps), work.want(), strict=True):
            assert np.allclose(got, want, atol=3e-6)
