"""How many KV blocks to make: a pure function of the settings and the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.core.config.resolved import CachePlan, ResolvedConfig
from dovetail.core.errors import OutOfMemoryError
from dovetail.core.kv.extent import most_blocks

if TYPE_CHECKING:
    from dovetail.core.contracts.runner import CacheSpec

__all__ = ["fit_cache", "readable_bytes"]


def fit_cache(resolved: ResolvedConfig, spec: CacheSpec) -> CachePlan:
    """Decide the size of the KV cache, and the context length that it holds.

    Raises:
        OutOfMemoryError: Not even one sequence of ``max_model_len`` fits (one block, if the
            user did not set the length); gives the bytes needed and available.
    """
    per_sequence = _per_sequence(resolved, spec)
    num_blocks, reason = _affordable(resolved, spec)
    if num_blocks >= per_sequence:
        return CachePlan(num_blocks=num_blocks, max_model_len=resolved.max_model_len, reason=reason)
    if resolved.max_model_len_is_given or num_blocks < 1:
        least = per_sequence if resolved.max_model_len_is_given else 1
        raise _too_little(resolved, least * spec.bytes_per_block, spec)
    max_model_len = num_blocks * resolved.block_size
    return CachePlan(
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        reason=f"{max_model_len:,} tokens per sequence fit, of the model's"
        f" {resolved.max_model_len:,} ({reason})",
    )


def _affordable(resolved: ResolvedConfig, spec: CacheSpec) -> tuple[int, str]:
    """Blocks that may be made, and why that many."""
    if resolved.num_blocks is not None:
        return resolved.num_blocks, f"num_gpu_blocks_override={resolved.num_blocks}"
    if resolved.kv_cache_memory_bytes is not None:
        budget = resolved.kv_cache_memory_bytes
        if budget > spec.bytes_available:
            raise _too_little(resolved, budget, spec)
        reason = f"kv_cache_memory_bytes is {readable_bytes(budget)}"
    else:
        budget = int(resolved.memory_utilization * spec.bytes_available)
        share = f"{resolved.memory_utilization:g} of {readable_bytes(spec.bytes_available)}"
        reason = f"gpu_memory_utilization takes {share}"
    most = budget // spec.bytes_per_block
    per_sequence = _per_sequence(resolved, spec)
    useful = resolved.max_num_seqs * per_sequence
    if useful < most:
        return useful, f"{resolved.max_num_seqs} requests of {resolved.max_model_len:,} tokens"
    return max(most, 0), reason


def _per_sequence(resolved: ResolvedConfig, spec: CacheSpec) -> int:
    """The most blocks that one sequence holds."""
    return most_blocks(
        resolved.max_model_len, resolved.block_size, spec.window, resolved.max_num_batched_tokens
    )


def _too_little(resolved: ResolvedConfig, needed: int, spec: CacheSpec) -> OutOfMemoryError:
    per_sequence = _per_sequence(resolved, spec) * spec.bytes_per_block
    return OutOfMemoryError(
        f"the KV cache needs {readable_bytes(needed)} ({needed} bytes; one sequence of"
        f" {resolved.max_model_len:,} tokens takes {readable_bytes(per_sequence)}) and"
        f" {readable_bytes(max(spec.bytes_available, 0))} ({max(spec.bytes_available, 0)} bytes)"
        " are available: lower --max-model-len, raise --kv-cache-memory-bytes or"
        " --gpu-memory-utilization within what is free, or choose a smaller --kv-cache-dtype"
    )


def readable_bytes(num_bytes: int) -> str:
    """Bytes for people, in decimal units: ``1.5 GB``."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
