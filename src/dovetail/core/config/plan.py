"""Whether a model fits a device, what it takes, and what makes it fit. No weights are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dovetail.core.config.cache import fit_cache, readable_bytes
from dovetail.core.config.checkpoint import ModelFacts
from dovetail.core.config.installed import resolve_installed
from dovetail.core.config.resolved import ResolvedConfig
from dovetail.core.config.schema import EngineConfig
from dovetail.core.contracts.runner import CacheSpec, RunnerPlan
from dovetail.core.errors import DovetailError, OutOfMemoryError
from dovetail.core.kv.extent import blocks_for, most_blocks
from dovetail.core.plugins.quant import quant_registry

if TYPE_CHECKING:
    from dovetail.core.contracts.platform import Memory, Platform

__all__ = ["EnginePlan", "Remedy", "plan_engine", "remedies"]

_LEAST_STEP = 256
"""Tokens of a step below which prompts would take too long to be worth suggesting."""
_MOST_UTILIZATION = 0.98


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """What an engine would be, and the memory that it would take, in bytes of one device."""

    resolved: ResolvedConfig
    """Every setting; the context length is the one that fits."""
    runner: RunnerPlan
    memory: Memory
    num_blocks: int
    """KV blocks that fit; if it does not fit, those that are needed at least."""
    reason: str
    """Why that many, in one line; if it does not fit, what is short."""
    fits: bool
    """It would start."""
    shortfall: int
    """Bytes of free memory that are missing; 0 if it fits, or a setting alone stands in the way."""

    @property
    def cache_bytes(self) -> int:
        """Of the KV cache."""
        return self.num_blocks * self.runner.bytes_per_block

    @property
    def left(self) -> int:
        """Bytes that stay free; below 0 if it does not fit."""
        taken = self.runner.weight_bytes + self.runner.step_bytes + self.cache_bytes
        return self.memory.free - taken

    @property
    def bytes_per_token(self) -> float:
        """Of the KV cache."""
        return self.runner.bytes_per_block / self.resolved.block_size

    @property
    def num_tokens(self) -> int:
        """Positions that the cache holds."""
        return self.num_blocks * self.resolved.block_size

    def num_requests(self, num_tokens: int) -> int:
        """Requests of so many tokens that are served at once, their whole length in the cache."""
        resolved = self.resolved
        each = most_blocks(
            num_tokens, resolved.block_size, self.runner.window, resolved.max_num_batched_tokens
        )
        return min(self.num_blocks // each, resolved.max_num_seqs)


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Settings with which it would fit."""

    flags: str
    plan: EnginePlan


def plan_engine(
    intent: EngineConfig,
    facts: ModelFacts,
    platform: Platform,
    memory: Memory,
    *,
    allow_long: bool = False,
) -> EnginePlan:
    """Decide everything that ``dovetail serve`` would decide.

    Args:
        intent: What the user wants.
        facts: What the checkpoint is.
        platform: Made, and nothing loaded.
        memory: Of the device, before anything is loaded.
        allow_long: Let ``max_model_len`` exceed the checkpoint's limit.

    Raises:
        UserError: The settings cannot be served, whatever the memory, or nothing can be known
            before the weights are read.
    """
    resolved = resolve_installed(intent, facts, platform, allow_long=allow_long)
    runner = platform.runner(resolved.runner_config()).plan()
    return _fit(resolved, runner, memory)


def remedies(
    plan: EnginePlan, intent: EngineConfig, again: Callable[[EngineConfig], EnginePlan]
) -> tuple[Remedy, ...]:
    """Settings with which a plan that does not fit would; each was planned, and fits.

    Args:
        plan: The one that does not fit.
        intent: What it was made of.
        again: Plans another intent.
    """
    found: list[Remedy] = []
    together: dict[str, object] = {}
    for field, value in _savings(plan, intent):
        remedy = _try({field: value}, intent, again)
        if remedy is None:
            continue
        together.setdefault(field, value)
        if remedy.plan.fits:
            found.append(remedy)
    if found:
        return tuple(found)
    with_length = dict(together)
    together.pop("max_model_len", None)
    combined = (_try(change, intent, again) for change in (together, with_length))
    return tuple(remedy for remedy in combined if remedy is not None and remedy.plan.fits)[:1]


def _try(
    change: dict[str, object], intent: EngineConfig, again: Callable[[EngineConfig], EnginePlan]
) -> Remedy | None:
    """A change with its plan; None if the platform or the model does not allow it."""
    try:
        plan = again(replace(intent, **change))  # type: ignore[arg-type]
    except DovetailError:
        return None
    return Remedy(flags=" ".join(_flag(*item) for item in change.items()), plan=plan)


def _fit(resolved: ResolvedConfig, runner: RunnerPlan, memory: Memory) -> EnginePlan:
    available = memory.free - runner.weight_bytes - runner.step_bytes
    spec = CacheSpec(
        bytes_per_block=runner.bytes_per_block,
        bytes_available=max(0, available),
        window=runner.window,
    )
    least = _least_blocks(resolved, runner)
    share = 1.0 if _is_fixed(resolved) else resolved.memory_utilization
    needed = int(-(-least * runner.bytes_per_block // share))
    try:
        cache = fit_cache(resolved, spec)
    except OutOfMemoryError as error:
        num_blocks, reason, fits = least, str(error), False
    else:
        num_blocks, reason = cache.num_blocks, cache.reason
        needed = num_blocks * runner.bytes_per_block
        fits = needed <= available
        resolved = resolved.with_cache(cache)
    if available < 0:
        reason = (
            f"weights and a step alone take {readable_bytes(memory.free - available)}, and"
            f" {readable_bytes(memory.free)} are free"
        )
    return EnginePlan(
        resolved=resolved,
        runner=runner,
        memory=memory,
        num_blocks=num_blocks,
        reason=reason,
        fits=fits,
        shortfall=0 if fits else max(0, needed - available),
    )


def _least_blocks(resolved: ResolvedConfig, runner: RunnerPlan) -> int:
    """Blocks below which nothing starts."""
    if resolved.num_blocks is not None:
        return resolved.num_blocks
    if resolved.kv_cache_memory_bytes is not None:
        return blocks_for(resolved.kv_cache_memory_bytes, runner.bytes_per_block)
    if not resolved.max_model_len_is_given:
        return 1
    return most_blocks(
        resolved.max_model_len, resolved.block_size, runner.window, resolved.max_num_batched_tokens
    )


def _is_fixed(resolved: ResolvedConfig) -> bool:
    """The user has set the size of the cache."""
    return resolved.num_blocks is not None or resolved.kv_cache_memory_bytes is not None


def _savings(plan: EnginePlan, intent: EngineConfig) -> Iterator[tuple[str, object]]:
    """Fields with values that take less memory."""
    resolved = plan.resolved
    if intent.num_gpu_blocks_override is not None:
        yield "num_gpu_blocks_override", None
    if intent.kv_cache_memory_bytes is not None:
        yield "kv_cache_memory_bytes", None
    if intent.max_model_len is not None:
        yield "max_model_len", _longest(plan)
    if not _is_fixed(resolved) and resolved.memory_utilization < _MOST_UTILIZATION:
        yield "gpu_memory_utilization", _MOST_UTILIZATION
    if resolved.kv_dtype not in ("int8", "fp8_e4m3", "fp8_e5m2"):
        yield "kv_cache_dtype", "int8"
        yield "kv_cache_dtype", "fp8_e4m3"
    if resolved.dtype == "float32":
        yield "dtype", "bfloat16"
        yield "dtype", "float16"
    if resolved.quantization is None:
        yield from (("quantization", name) for name in quant_registry().names())
    least = max(_LEAST_STEP, resolved.max_num_seqs)
    if resolved.max_num_batched_tokens > least:
        yield "max_num_batched_tokens", least


def _longest(plan: EnginePlan) -> int | None:
    """The longest sequence that fits; None, which is ``auto``, if none does."""
    runner, resolved = plan.runner, plan.resolved
    available = plan.memory.free - runner.weight_bytes - runner.step_bytes
    share = 1.0 if _is_fixed(resolved) else resolved.memory_utilization
    if resolved.num_blocks is not None:
        blocks = resolved.num_blocks
    else:
        budget = resolved.kv_cache_memory_bytes or int(share * max(0, available))
        blocks = budget // runner.bytes_per_block
    longest = min(blocks * resolved.block_size, resolved.max_model_len)
    return longest or None


def _flag(field: str, value: object) -> str:
    name = "--" + field.replace("_", "-")
    return f"without {name}" if value is None else f"{name} {value}"
