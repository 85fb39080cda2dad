"""What ``dovetail plan`` prints: the memory as figures and as a bar, and every choice."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dovetail.core.config.cache import readable_bytes
from dovetail.core.config.checkpoint import ModelFacts
from dovetail.core.config.plan import EnginePlan, Remedy
from dovetail.core.config.schema import EngineConfig, engine_options

__all__ = ["memory_bar", "plan_json", "plan_text", "setting_reasons"]

_INTENT_NAMES = {
    "kv_dtype": "kv_cache_dtype",
    "num_blocks": "num_gpu_blocks_override",
    "memory_utilization": "gpu_memory_utilization",
    "speculation": "speculative_config",
}
"""Settings whose wish has another name."""
_LEFT_OUT = (
    "model", "served_model_names", "model_path", "hf_config", "architecture", "tokenizer_path",
    "tokenizer_mode", "skip_tokenizer_init", "vocab_size", "eos_token_ids", "default_params",
    "platform", "max_model_len_is_given", "draft", "disable_log_stats", "reasons",
)  # fmt: skip
"""What is no setting, or shown elsewhere, or has nothing to do with the device."""
_OPEN = {
    "model_impl": "Dovetail's own code, where it has the architecture",
    "load_format": "what the folder holds",
    "kv_dtype": "as the activations",
    "max_model_len": "what the model was made for",
    "max_num_seqs": "the platform's",
    "max_num_batched_tokens": "the platform's",
    "block_size": "the platform's favourite",
    "async_scheduling": "the platform's",
}
"""Where a setting comes from that the user left open."""
_WIDTH = 96
_BAR = 64
_PARTS = (
    ("others", "x", "90"),
    ("weights", "W", "34"),
    ("step", "s", "33"),
    ("KV cache", "K", "32"),
)
"""Parts of the bar: what it is, its letter, its colour on a terminal (ECMA-48)."""


def plan_text(
    plan: EnginePlan,
    facts: ModelFacts,
    intent: EngineConfig,
    fixes: Sequence[Remedy],
    *,
    typical: int,
    colour: bool,
) -> str:
    """For people, without a final newline.

    Args:
        plan: What was planned.
        facts: Of the model.
        intent: What the user asked for.
        fixes: Settings with which it would fit, if it does not.
        typical: Tokens of a typical request.
        colour: Write the escape sequences of a terminal.
    """
    blocks = [
        "\n".join(_model(plan, facts)),
        "\n".join([*_memory(plan), "", memory_bar(plan, colour=colour)]),
        "\n".join(_verdict(plan, fixes, typical)),
        "\n".join(["chosen", *_rows(plan.runner.choices)]),
        "\n".join(["settings", *_rows(_settings(plan, intent))]),
    ]
    return "\n\n".join(blocks)


def plan_json(
    plan: EnginePlan,
    facts: ModelFacts,
    intent: EngineConfig,
    fixes: Sequence[Remedy],
    *,
    typical: int,
) -> str:
    """The same for programs; sizes in bytes."""
    resolved = plan.resolved
    found = {
        "model": facts.name,
        "architecture": resolved.architecture,
        "platform": resolved.platform,
        "fits": plan.fits,
        "shortfall": plan.shortfall,
        "reason": plan.reason,
        "memory": {
            "total": plan.memory.total,
            "free": plan.memory.free,
            "weights": plan.runner.weight_bytes,
            "step": plan.runner.step_bytes,
            "kv_cache": plan.cache_bytes,
            "left": plan.left,
        },
        "kv_cache": {
            "num_blocks": plan.num_blocks,
            "block_size": resolved.block_size,
            "bytes_per_block": plan.runner.bytes_per_block,
            "bytes_per_token": plan.bytes_per_token,
            "num_tokens": plan.num_tokens,
            "window": plan.runner.window,
        },
        "max_model_len": resolved.max_model_len,
        "num_requests": {
            str(length): plan.num_requests(length) for length in _lengths(plan, typical)
        },
        "choices": dict(plan.runner.choices),
        "settings": {
            name: {"value": getattr(resolved, name), "reason": reason}
            for name, reason in setting_reasons(plan, intent).items()
        },
        "remedies": [
            {"flags": fix.flags, "max_model_len": fix.plan.resolved.max_model_len} for fix in fixes
        ],
    }
    return json.dumps(found, indent=2, default=_plain)


def setting_reasons(plan: EnginePlan, intent: EngineConfig) -> dict[str, str]:
    """Why each setting is what it is, by its name."""
    options = engine_options()
    reasons = {}
    for field in dataclasses.fields(plan.resolved):
        if field.name in _LEFT_OUT:
            continue
        option = options.get(_INTENT_NAMES.get(field.name, field.name))
        if field.name in plan.resolved.reasons:
            reason = plan.resolved.reasons[field.name]
        elif option is None:
            reason = f"as platform {plan.resolved.platform} has it"
        elif getattr(intent, option.name) != option.normalise(option.default):
            reason = "as asked for"
        else:
            reason = _OPEN.get(field.name, "default")
        reasons[field.name] = reason
    return reasons


def memory_bar(plan: EnginePlan, *, colour: bool) -> str:
    """Where the memory goes, to scale; a mark shows where the device ends before it should."""
    sizes = (
        plan.memory.total - plan.memory.free,
        plan.runner.weight_bytes,
        plan.runner.step_bytes,
        plan.cache_bytes,
    )
    whole = max(plan.memory.total, sum(sizes), 1)
    cells, taken, drawn = [], 0, 0
    for (_, letter, code), size in zip(_PARTS, sizes, strict=True):
        taken += size
        width = round(_BAR * taken / whole) - drawn
        drawn += width
        cells.append(f"\x1b[{code}m{'█' * width}\x1b[0m" if colour else letter * width)
    lines = [f"[{''.join(cells)}{('░' if colour else '.') * (_BAR - drawn)}]"]
    if whole > plan.memory.total:
        lines.append(" " * round(_BAR * plan.memory.total / whole) + " ^ the device ends here")
    lines.append("  ".join(_legend(colour)))
    return "\n".join(lines)


def _legend(colour: bool) -> Iterator[str]:
    for name, letter, code in _PARTS:
        yield f"\x1b[{code}m█\x1b[0m {name}" if colour else f"{letter} {name}"
    yield f"{'░' if colour else '.'} free"


def _model(plan: EnginePlan, facts: ModelFacts) -> Iterator[str]:
    resolved = plan.resolved
    yield f"{facts.name} on {resolved.platform}"
    yield from _rows(
        {
            "model": f"{resolved.architecture} ({resolved.model_impl}), vocabulary of"
            f" {facts.vocab_size:,}, made for {facts.max_model_len:,} tokens",
            "dtype": f"{resolved.dtype} ({resolved.reasons.get('dtype', 'as asked for')}),"
            f" KV cache in {resolved.kv_dtype}",
            "quantization": resolved.quantization or "none",
        }
    )


def _memory(plan: EnginePlan) -> Iterator[str]:
    runner, memory = plan.runner, plan.memory
    devices = plan.resolved.tensor_parallel_size
    each = f", each of {devices} devices" if devices > 1 else ""
    yield f"memory: {readable_bytes(memory.free)} free of {readable_bytes(memory.total)}{each}"
    per_block = f"{readable_bytes(runner.bytes_per_block)} for {plan.resolved.block_size} tokens"
    least = "" if plan.fits else "at least "
    blocks = f"{plan.num_blocks:,} block{'' if plan.num_blocks == 1 else 's'}"
    yield from _rows(
        {
            "weights": readable_bytes(runner.weight_bytes),
            "step": f"{readable_bytes(runner.step_bytes)} at most",
            "KV cache": f"{readable_bytes(plan.cache_bytes)}: {least}{blocks} of"
            f" {per_block}, {plan.bytes_per_token:,.0f} bytes per token",
            "left": readable_bytes(plan.left) if plan.left >= 0 else "nothing",
        }
    )


def _verdict(plan: EnginePlan, fixes: Sequence[Remedy], typical: int) -> Iterator[str]:
    if plan.fits:
        yield f"It fits: {plan.num_tokens:,} tokens in the cache ({plan.reason})."
        counts = [
            f"{plan.num_requests(length):,} of {length:,} tokens"
            for length in _lengths(plan, typical)
        ]
        most = plan.resolved.max_num_seqs
        yield f"Requests at once: {' or '.join(counts)} (max_num_seqs allows {most:,})."
        return
    if plan.shortfall:
        missing = readable_bytes(plan.shortfall)
        needed = readable_bytes(plan.memory.free + plan.shortfall)
        yield f"It does not fit: {missing} are missing; {needed} free would do."
    else:
        yield "It does not fit in the cache that was asked for."
    yield from textwrap.wrap(plan.reason, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    for fix in fixes:
        length = fix.plan.resolved.max_model_len
        yield f"It would fit: {fix.flags}  ({length:,} tokens per request)"
    if not fixes:
        yield "No setting that is known to save memory would make it fit."


def _lengths(plan: EnginePlan, typical: int) -> tuple[int, ...]:
    """Lengths of requests to count, the longest first."""
    longest = plan.resolved.max_model_len
    return (longest, typical) if typical < longest else (longest,)


def _settings(plan: EnginePlan, intent: EngineConfig) -> dict[str, str]:
    return {
        name: f"{_shown(getattr(plan.resolved, name))}  ({reason})"
        for name, reason in setting_reasons(plan, intent).items()
    }


def _shown(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "on" if value else "off"
        case int():
            return f"{value:,}"
        case _:
            return str(value) if value or value == 0 else "-"


def _rows(lines: Mapping[str, str]) -> Iterator[str]:
    width = max(map(len, lines), default=0) + 2
    for topic, text in lines.items():
        indent = " " * (width + 2)
        wrapped = textwrap.wrap(text, _WIDTH - width, break_on_hyphens=False) or [""]
        yield f"  {topic:<{width}}" + f"\n{indent}".join(wrapped)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return dict(value)
