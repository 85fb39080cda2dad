"""What the attention backend launches, on GPUs that are not here: recorded, not run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dovetail.attention_backends.triton.backend import TritonAttention
from dovetail.attention_backends.triton.kernels.language import PLAN_ARGUMENTS
from dovetail.attention_backends.triton.launch import HOMES, Launch, kernel_of
from dovetail.attention_backends.triton.target import Target
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from tests.attention_backends.sequences import Sequences
from tests.gpu_targets.targets import Case, effort

META = torch.device("meta")
NUMBERS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx90a": 104, "gfx942": 304, "gfx950": 256}
"""Multiprocessors."""
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
ALIBI = {"alibi_slopes": (0.5,) * 32}
LAYERS: Mapping[str, dict[str, Any]] = {
    "64": {"head_size": 64},
    "128": {"head_size": 128},
    "256": {"head_size": 256},
    "128 e4m3": {"kv_dtype": "fp8_e4m3"},
}
"""Compiled each time, for every GPU."""
VARIANTS: Mapping[str, dict[str, Any]] = {
    "128 fp16": {"dtype": "float16"},
    "128 window cap": {"window": 1024, "soft_cap": 50.0},
    "128 alibi": ALIBI,
}
"""Compiled each time, for one GPU of each vendor: what they add to the above is the same code."""
VENDORS = ("sm_90", "gfx942")
MORE: Mapping[str, dict[str, Any]] = {
    **{str(size): {"head_size": size} for size in (80, 96, 112, 160, 192)},
    **{f"{size} fp32": {"head_size": size, "dtype": "float32"} for size in (64, 128, 256)},
    **{
        f"{size} {kv_dtype}": {"head_size": size, "kv_dtype": kv_dtype}
        for size in (64, 128, 256)
        for kv_dtype in ("fp8_e4m3", "fp8_e5m2", "int8")
    },
    **{
        f"{size} fp32 {kv_dtype}": {"head_size": size, "dtype": "float32", "kv_dtype": kv_dtype}
        for size in (64, 128, 256)
        for kv_dtype in ("fp8_e4m3", "int8")
    },
    "256 fp16 e4m3": {"head_size": 256, "dtype": "float16", "kv_dtype": "fp8_e4m3"},
    "256 window cap": {"head_size": 256, "window": 4096, "soft_cap": 50.0},
    "64 alibi": {"head_size": 64, **ALIBI},
    "128 one KV head": {"num_kv_heads": 1},
    "128 as many KV heads": {"num_kv_heads": 32},
    "128 seven heads": {"num_heads": 28, "num_kv_heads": 4},
    "128 blocks of 256": {"block_size": 256},
}
"""With DOVETAIL_GPU_TARGETS=full."""


def full() -> bool:
    return effort() == "full"


def cases(target: str) -> dict[str, Case]:
    """Launches by layer and kernel; every kernel of every layer with DOVETAIL_GPU_TARGETS=full."""
    if full():
        layers = {**LAYERS, **VARIANTS, **MORE}
    else:
        layers = {**LAYERS, **VARIANTS} if target in VENDORS else LAYERS
    return {
        f"{name}: {kind}": _case(launch)
        for name, layer in layers.items()
        for kind, launch in _launches(target, **layer)
        if full() or _chosen(target, name, kind)
    }


def _chosen(target: str, name: str, kind: str) -> bool:
    """Worth being compiled each time: of every GPU the usual, of one of each vendor more."""
    if kind.startswith("write"):
        return name in ("128", "128 e4m3")
    attends = kind in ("prefill", "decode alone")
    return (attends or name == "128") if target in VENDORS else (attends and name != "64")


def _launches(target: str, **layer: Any) -> Iterator[tuple[str, Launch]]:
    """Of a step in which rows decode, and of one of many tokens."""
    facts = {"head_size": 128, "num_heads": 32, "num_kv_heads": 8} | layer
    dtype = facts.pop("dtype", "bfloat16")
    kv_dtype, block_size = facts.pop("kv_dtype", dtype), facts.pop("block_size", 16)
    spec = AttentionSpec(layer=0, scale=facts["head_size"] ** -0.5, **facts)
    need = AttentionNeed(specs=(spec,), dtype=dtype, kv_dtype=kv_dtype, block_size=block_size)
    seen: list[Launch] = []
    backend = TritonAttention(
        META, target=Target.named(target, NUMBERS[target]), launch=seen.append
    )
    assert backend.refuses(need) is None
    work = Sequences(spec, need, (40, 40))
    alone, mixed = work.batch([(0, 20, 1), (1, 9, 1)]), work.batch([(0, 0, 30), (1, 9, 2)])
    for kind, batch, rotates in (
        ("alone", alone, True),
        ("mixed", mixed, True),
        ("as it is", alone, False),
    ):
        seen.clear()
        _step(backend, work, batch, rotates=rotates)
        for launch in seen:
            few = launch.kernel in ("decode", "reduce")
            if launch.kernel == "write" and kind != "alone":
                yield "write" if rotates else f"write {kind}", launch
            elif rotates and (few or kind == "mixed"):
                yield f"{launch.kernel} {kind}" if few else launch.kernel, launch


def _step(backend: TritonAttention, work: Sequences, batch: Any, *, rotates: bool) -> None:
    """Of a model, with norms if it rotates, its queries, keys and values cut out of one array."""
    spec, dtype = work.spec, getattr(torch, work.need.dtype)
    heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    qkv = torch.empty(batch.num_tokens, sum(heads), spec.head_size, dtype=dtype, device=META)
    arrays = backend.host_plan(batch, work.need)
    there = [torch.empty(array.size, dtype=torch.int32, device=META) for array in arrays]
    plan = backend.device_plan(there, batch, work.need)
    sides, cache = qkv.split(heads, 1), backend.allocate(spec, work.need, 8)
    if not rotates:
        backend.attend(*sides, cache, plan, spec)
        return
    angle = torch.empty(batch.num_tokens, spec.head_size // 2, device=META)
    norm = torch.empty(spec.head_size, dtype=dtype, device=META)
    backend.rotary_attend(*sides, (angle, angle), (norm, norm, 1e-6), cache, plan, spec)


def _case(launch: Launch) -> Case:
    """As Triton sees the launch: what it specialises on."""
    options = dict(launch.options)
    names = kernel_of(launch.kernel).arg_names[: len(launch.arguments)]
    given = dict(zip(names, launch.arguments, strict=True))
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    numbers = {name: value for name, value in given.items() if isinstance(value, int)}
    return Case(
        kernel=f"{HOMES[launch.kernel]}:{launch.kernel}",
        signature={
            **{name: TYPES[tensor.dtype] for name, tensor in tensors.items()},
            **dict.fromkeys(numbers, "i32"),
        },
        divisible=frozenset(
            [name for name in tensors if name not in PLAN_ARGUMENTS]
            + [name for name, number in numbers.items() if number % 16 == 0]
        ),
        num_warps=options.pop("num_warps", 4),
        num_stages=options.pop("num_stages", 3),
        constants={**options, **{name: None for name, value in given.items() if value is None}},
    )
