"""AITER, emulated, against the reference backend; and why it refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dovetail_rocm.aiter import AiterAttention
from dovetail_rocm.platform import RocmPlatform

from dovetail.attention_backends.reference import ReferenceAttention
from dovetail.core.contracts.attention import AttentionNeed
from dovetail.core.errors import ConfigError
from dovetail.core.plugins.attention import choose_attention
from tests.attention_backends.paged import CPU, PagedBackend
from tests.attention_backends.sequences import Sequences, make_need, make_spec


def make(target: str | None = "gfx942", hip: str = "7.1.25424") -> AiterAttention:
    return AiterAttention(CPU, target, hip)


@pytest.mark.usefixtures("emulated")
class TestAiter(PagedBackend):
    def make(self) -> Any:
        return make()

    @pytest.mark.parametrize("block_size", [16, 32])
    @pytest.mark.parametrize("path", ["one_by_one", "mixed"])
    @pytest.mark.parametrize("window", [None, 7, 300])
    def test_what_others_left_in_a_block_reaches_nobody(
        self, window: int | None, path: str, block_size: int
    ) -> None:
        """The kernels read whole tiles and multiply by 0 what a row does not see."""
        spec = make_spec(size=64, window=window)
        need = self.served(spec, block_size=block_size)
        work = Sequences(spec, need, (45, 20, 33))
        want = work.run(ReferenceAttention(CPU), work.whole())
        made = self.make()
        cache = made.allocate(spec, need, work.num_blocks)
        made.allocate = lambda *_: cache
        bad = Sequences(spec, need, [work.width * block_size] * 3)
        for value in (torch.nan, torch.inf, -torch.inf):
            bad.v = [torch.full_like(each, value) for each in bad.v]
            bad.run(made, bad.whole())
            for got, wanted in zip(work.run(made, getattr(work, path)()), want, strict=True):
                assert torch.allclose(got.float(), wanted.float(), atol=2e-3)

    def test_memory_of_recorded_steps_is_kept(self) -> None:
        made = self.make()
        few, many, fewer = (made._memory(sums, 64) for sums in (10, 100, 5))
        assert fewer is many and len(many) == 100 * 136
        assert any(each is few for each in made._partial)

    def test_keys_that_it_cannot_count_are_told(self) -> None:
        spec = make_spec(heads=32, kv_heads=8, size=128)
        need = self.served(spec)
        room = 2**31 // (16 * 8 * 128)
        with pytest.raises(
            ConfigError, match=f"room for {room} .* not {room + 1}.*override {room}"
        ):
            self.make().allocate(spec, need, room + 1)


def halves(size: int = 128, **more: Any) -> AttentionNeed:
    fixed = {"dtype": "bfloat16", "kv_dtype": "bfloat16"}
    return make_need(make_spec(size=size), **(fixed | more))


ALIBI = replace(make_spec(size=128), alibi_slopes=(0.5, 0.25, 0.125, 0.0625))
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "float32", "kv_dtype": "float32"}, "bfloat16 and float16, not float32"),
    ({"kv_dtype": "fp8_e4m3"}, "dtype of the queries, bfloat16, not fp8_e4m3"),
    ({"deterministic": True}, "depends on the other rows"),
    ({"size": 256}, "64 or 128 entries, not 256"),
    ({"size": 96}, "64 or 128 entries, not 96"),
    ({"block_size": 8}, "16 or 32 positions, not 8"),
    ({"block_size": 64}, "16 or 32 positions, not 64"),
]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_needs(change: dict[str, Any], words: str) -> None:
    assert make().refuses(halves()) is None
    assert words in str(make().refuses(halves(**change)))


@pytest.mark.usefixtures("emulated")
def test_layers() -> None:
    assert "ALiBi" in str(make().refuses(replace(halves(), specs=(ALIBI,))))
    for heads, reason in ((16, None), (32, None), (24, None), (17, "split 17 query heads")):
        spec = make_spec(heads=heads, kv_heads=1, size=128)
        said = make().refuses(replace(halves(), specs=(spec,)))
        assert said is None if reason is None else reason in str(said)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("target", "hip", "words"),
    [
        (None, "7.1.1", "needs an AMD GPU: gfx942 or gfx950"),
        ("gfx90a", "7.1.1", "not gfx90a"),
        ("gfx1201", "7.1.1", "not gfx1201"),
        ("gfx942", "7.2.53211", None),
        ("gfx950", "7.2.53211", "compiles its causal kernels wrongly"),
        ("gfx950", "7.20.1", None),
        ("gfx950", "7.1.1", None),
    ],
)
def test_generations(target: str | None, hip: str, words: str | None) -> None:
    reason = make(target, hip).refuses(halves())
    assert reason is None if words is None else words in str(reason)


def test_missing_and_foreign_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "aiter", None)
    assert "aiter is not installed: AMD's wheels, https" in str(make().refuses(halves()))
    monkeypatch.delitem(sys.modules, "aiter")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "aiter.py").write_text("async def aiter_of_iterators(): ...")
    assert "has no mha_batch_prefill_func, so it is too old or another" in str(
        make().refuses(halves())
    )


def test_simulated_it_refuses_and_comes_behind_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends = RocmPlatform(simulated=True).attention_backends()
    names = [backend.name for backend in backends if backend.name in RocmPlatform.attention_order]
    assert names == [name for name in RocmPlatform.attention_order if name in names]
    choice = choose_attention(backends, halves(), insisted=None)
    assert "needs an AMD GPU" in choice.reasons["aiter"]


def test_the_gpu_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    platform = RocmPlatform(simulated=True)
    assert platform._target() is None
    named = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: named)
    platform.simulated = False
    assert platform._target() == "gfx942"
