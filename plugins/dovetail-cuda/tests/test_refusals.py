"""Why a need is refused, and in which order backends are asked."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dovetail_cuda.flash import FlashAttention2, FlashAttention3
from dovetail_cuda.flashinfer import FlashInferAttention
from dovetail_cuda.order import attention_order
from dovetail_cuda.platform import CudaPlatform

from dovetail.core.contracts.attention import AttentionNeed
from dovetail.core.plugins.attention import BrokenBackend, choose_attention
from dovetail.platforms.gpu import platform as gpu
from tests.attention_backends.sequences import make_need, make_spec

CPU = torch.device("cpu")
BACKENDS: list[Any] = [FlashInferAttention, FlashAttention3, FlashAttention2]
MODULES = {
    FlashInferAttention: ("flashinfer", "pip install flashinfer-python"),
    FlashAttention3: ("flash_attn_interface", "pip install flash-attn-3"),
    FlashAttention2: ("flash_attn", "pip install flash-attn"),
}


def halves(backend: Any = None, size: int = 128, **more: Any) -> AttentionNeed:
    block_size = 256 if backend is FlashAttention2 else 16
    fixed = {"dtype": "bfloat16", "kv_dtype": "bfloat16", "block_size": block_size}
    return make_need(make_spec(size=size), **(fixed | more))


ALIBI = replace(make_spec(size=128), alibi_slopes=(0.5, 0.25, 0.125, 0.0625))
FOR_ALL: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "float32", "kv_dtype": "float32"}, "bfloat16 and float16, not float32"),
    ({"kv_dtype": "fp8_e4m3"}, "dtype of the queries, bfloat16, not fp8_e4m3"),
    ({"kv_dtype": "float16"}, "dtype of the queries, bfloat16, not float16"),
    ({"deterministic": True}, "depends on the other rows"),
    ({"specs": (ALIBI,)}, "ALiBi"),
    ({"size": 264}, "not 264"),
    ({"size": 20}, "not 20"),
]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "words"), FOR_ALL)
def test_needs(change: dict[str, Any], words: str, backend: Any) -> None:
    made = backend(CPU, (9, 0))
    assert made.refuses(halves(backend)) is None
    specs = change.get("specs")
    plain = {name: value for name, value in change.items() if name != "specs"}
    need = halves(backend, **plain)
    if specs is not None:
        need = replace(need, specs=specs)
    assert words in str(made.refuses(need))


@pytest.mark.usefixtures("emulated")
def test_what_only_one_of_them_asks() -> None:
    three, two, infer = (
        kind(CPU, (9, 0)) for kind in (FlashAttention3, FlashAttention2, FlashInferAttention)
    )
    assert three.refuses(halves(size=96)) is None
    assert "64, 128, 256 entries, not 96" in str(infer.refuses(halves(size=96)))
    for size in (8, 32):
        assert three.refuses(halves(block_size=size)) is None
    for size in (64, 128, 256):
        assert f"positions, not {size}" in str(three.refuses(halves(block_size=size)))
        assert infer.refuses(halves(block_size=size)) is None
    assert "multiple of 256 positions, not 128: --block-size 256" in str(
        two.refuses(halves(block_size=128))
    )


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("backend", "capability", "words"),
    [
        (FlashInferAttention, None, "needs an NVIDIA GPU"),
        (FlashInferAttention, (7, 5), "not 7.5"),
        (FlashInferAttention, (8, 0), None),
        (FlashInferAttention, (12, 0), None),
        (FlashAttention3, None, "needs an NVIDIA GPU"),
        (FlashAttention3, (8, 9), "Hopper"),
        (FlashAttention3, (10, 0), "not 10.0"),
        (FlashAttention2, None, "needs an NVIDIA GPU"),
        (FlashAttention2, (7, 5), "not 7.5"),
        (FlashAttention2, (10, 0), None),
    ],
)
def test_generations(backend: Any, capability: Any, words: str | None) -> None:
    reason = backend(CPU, capability).refuses(halves(backend))
    assert reason is None if words is None else words in str(reason)


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_and_broken_packages(
    backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, command = MODULES[backend]

    def reason() -> str:
        return str(backend(CPU, (9, 0)).refuses(halves(backend)))

    monkeypatch.setitem(sys.modules, module, None)
    assert f"package {module} is not installed: {command}" in reason()
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / f"{module}.py"
    file.write_text("raise OSError('libcudart.so.13: cannot open')")
    assert f"{module} cannot be imported: OSError: libcudart.so.13" in reason()
    file.write_text("import a_module_that_nobody_has")
    assert f"{module} lacks module a_module_that_nobody_has" in reason()


def test_orders() -> None:
    assert attention_order((9, 0))[:3] == ("triton", "flashinfer", "flash3")
    assert attention_order((8, 9)) == attention_order((8, 0))
    assert attention_order((7, 5)) == attention_order((12, 1)) == attention_order(None)
    for capability in ((9, 0), (8, 0), (10, 3), None):
        order = attention_order(capability)
        assert len(set(order)) == len(order)
        assert {"flashinfer", "triton", "flash2", "sdpa", "reference"} <= set(order)


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> CudaPlatform:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return CudaPlatform(simulated=True)


def test_simulated_they_refuse_and_come_in_order(platform: CudaPlatform) -> None:
    backends = platform.attention_backends()
    names = [backend.name for backend in backends]
    listed = attention_order(None)
    assert [name for name in names if name in listed] == [n for n in listed if n in names]
    assert {"flashinfer", "flash2", "flash3", "sdpa", "reference"} <= set(names)
    choice = choose_attention(backends, halves(), insisted=None)
    for name in ("flashinfer", "flash2", "flash3"):
        assert "needs an NVIDIA GPU" in choice.reasons[name]
        assert name in choice.describe()
    assert choice.backend.name not in ("flashinfer", "flash2", "flash3")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("capability", "size", "chosen"),
    [((9, 0), 128, "triton"), ((8, 0), 128, "flashinfer"), ((8, 0), 96, "triton")],
)
def test_the_first_that_serves_is_taken(
    capability: tuple[int, int],
    size: int,
    chosen: str,
    platform: CudaPlatform,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "_capability", lambda: capability)
    backends = platform.attention_backends()
    assert choose_attention(backends, halves(size=size), insisted=None).backend.name == chosen


def test_a_name_that_two_packages_offer(
    platform: CudaPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = BrokenBackend("flash3", "another's")
    monkeypatch.setattr(gpu, "installed_backends", lambda *_: [other])
    backends = {backend.name: backend for backend in platform.attention_backends()}
    assert "another package offer it" in str(backends["flash3"].refuses(halves()))
    assert list(backends) == ["flashinfer", "flash2", "flash3"]
