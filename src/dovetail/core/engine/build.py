"""From the user's wishes to an engine that is ready: the same way in every process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dovetail.core.config.cache import fit_cache, readable_bytes
from dovetail.core.config.checkpoint import ModelFacts, read_facts
from dovetail.core.config.env import read_environment
from dovetail.core.config.installed import resolve_installed
from dovetail.core.config.resolved import ResolvedConfig
from dovetail.core.config.schema import EngineConfig
from dovetail.core.contracts.platform import Platform
from dovetail.core.contracts.runner import Runner
from dovetail.core.engine.collector import paused
from dovetail.core.engine.core import EngineCore
from dovetail.core.plugins.selection import load_platform, platform_registry
from dovetail.core.scheduler.scheduler import Scheduler, SchedulerConfig
from dovetail.core.structured.base import Grammars, NoGrammars
from dovetail.core.structured.grammars import EngineGrammars
from dovetail.core.structured.vocabulary import encoder, read_vocabulary
from dovetail.core.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from dovetail.core.structured.backend import Backend

__all__ = ["BuiltEngine", "Progress", "build_engine", "ignore_progress"]

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all); bytes for weights."""


def ignore_progress(name: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """An engine that is ready, and what was decided on the way."""

    core: EngineCore
    platform: Platform
    config: ResolvedConfig
    num_blocks: int
    banner: dict[str, str]
    """Lines for the start-up message, by topic."""
    features: frozenset[str]
    """What the platform can do: ``Capabilities.features``."""


@paused()
def build_engine(config: EngineConfig, platform_name: str, progress: Progress) -> BuiltEngine:
    """Make the platform, decide the settings, load the model and the cache, warm up.

    Args:
        config: The user's wishes.
        platform_name: The platform that was selected; nothing is detected again.
        progress: Told how far the loading is.

    Raises:
        UserError: A wish that cannot be served, or a checkpoint that is wrong.
        PluginError: The platform failed to start.
        OutOfMemoryError: The weights or one sequence's cache do not fit.
    """
    environment = read_environment(os.environ, warn=False)
    facts = read_facts(config)
    origin = platform_registry(os.environ).entry(platform_name).origin
    progress(f"starting platform {platform_name} ({origin})", 0, 0)
    platform = load_platform(platform_name, os.environ)
    allow_long = environment.allow_long_max_model_len
    resolved = resolve_installed(config, facts, platform, allow_long=allow_long)
    runner = platform.runner(resolved.runner_config())
    weight_bytes = 0
    for done, weight_bytes in runner.load():
        progress("loading weights", done, weight_bytes)
    return _ready(config, resolved, facts, platform, runner, weight_bytes, progress)


def _ready(
    config: EngineConfig,
    resolved: ResolvedConfig,
    facts: ModelFacts,
    platform: Platform,
    runner: Runner,
    weight_bytes: int,
    progress: Progress,
) -> BuiltEngine:
    spec = runner.cache_spec()
    plan = fit_cache(resolved, spec)
    resolved = resolved.with_cache(plan)
    runner.allocate(plan.num_blocks)
    for count, part in enumerate(runner.warm_up()):
        progress(f"warming up: {part.name}", count + 1, part.num_parts)
    core = EngineCore(
        Scheduler(
            scheduler_config(resolved, plan.num_blocks, spec.window),
            _grammars(config, resolved, facts),
        ),
        runner,
        steps_ahead=int(resolved.async_scheduling),
    )
    cache_bytes = plan.num_blocks * spec.bytes_per_block
    num_tokens = plan.num_blocks * resolved.block_size
    banner = {
        "device": ", ".join(platform.device_names()),
        "model": f"{facts.name} ({resolved.architecture}, {resolved.model_impl},"
        f" {resolved.dtype}, {resolved.max_model_len:,} tokens of context)",
        "memory": f"weights {readable_bytes(weight_bytes)}, KV cache {readable_bytes(cache_bytes)}"
        f" = {num_tokens:,} tokens ({plan.reason})",
        **runner.describe(),
        **_speculation(resolved),
    }
    return BuiltEngine(
        core=core,
        platform=platform,
        config=resolved,
        num_blocks=plan.num_blocks,
        banner=banner,
        features=platform.capabilities.features,
    )


def _grammars(config: EngineConfig, resolved: ResolvedConfig, facts: ModelFacts) -> Grammars:
    """Of requests that ask for a form; the tokenizer is read when the first of them comes."""
    if config.skip_tokenizer_init:
        return NoGrammars()

    def make() -> Backend:
        from dovetail.core.structured.backend import Backend

        tokenizer = load_tokenizer(
            facts.tokenizer_path,
            mode=config.tokenizer_mode,
            trust_remote_code=config.trust_remote_code,
        )
        vocabulary = read_vocabulary(tokenizer, resolved.vocab_size, facts.eos_token_ids)
        return Backend(vocabulary, encoder(tokenizer))

    return EngineGrammars(resolved.vocab_size, make)


def _speculation(resolved: ResolvedConfig) -> dict[str, str]:
    """A line on what guesses, if anything does."""
    chosen = resolved.speculation
    if chosen is None:
        return {}
    source = f"the draft model {chosen.model}" if chosen.model else chosen.method
    length = f"at most {chosen.num_speculative_tokens} tokens ahead"
    return {"speculation": f"{source}, {length}{', while it pays' if chosen.adaptive else ''}"}


def scheduler_config(
    resolved: ResolvedConfig, num_blocks: int, window: int | None
) -> SchedulerConfig:
    """The scheduler's part of the settings, for ``num_blocks`` blocks besides block 0.

    ``window``: see ``CacheSpec.window``.
    """
    return SchedulerConfig(
        num_blocks=num_blocks + 1,
        block_size=resolved.block_size,
        max_model_len=resolved.max_model_len,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        vocab_size=resolved.vocab_size,
        window=window,
        enable_prefix_caching=resolved.enable_prefix_caching,
        enable_chunked_prefill=resolved.enable_chunked_prefill,
        mixed_batches=resolved.mixed_batches,
        policy=resolved.scheduling_policy,
        priority_ageing_seconds=resolved.priority_ageing_seconds,
        speculation=resolved.speculation,
    )
