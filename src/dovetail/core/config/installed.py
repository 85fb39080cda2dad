"""Decisions with what is installed: the impure half of ``resolve``."""

from __future__ import annotations

from dataclasses import replace

from dovetail.core.config.checkpoint import ModelFacts, read_facts
from dovetail.core.config.model_choice import PlatformView
from dovetail.core.config.resolve import resolve
from dovetail.core.config.resolved import ResolvedConfig
from dovetail.core.config.schema import EngineConfig
from dovetail.core.config.speculative import SpeculativeConfig
from dovetail.core.models.registry import find_model, native_architectures
from dovetail.core.plugins.quant import quant_registry

__all__ = ["resolve_installed"]


def resolve_installed(
    intent: EngineConfig, facts: ModelFacts, platform: PlatformView, *, allow_long: bool = False
) -> ResolvedConfig:
    """``resolve`` with the models and quantization schemes that are installed.

    Reads the facts of the draft model, if there is to be one. Raises as ``resolve`` and
    ``read_facts`` do.
    """
    return resolve(
        intent,
        facts,
        platform,
        find_model(facts.architectures) is not None,
        known=native_architectures(),
        schemes=quant_registry().names(),
        allow_long=allow_long,
        draft=_draft_facts(intent),
    )


def _draft_facts(intent: EngineConfig) -> ModelFacts | None:
    speculation = SpeculativeConfig.parse(intent.speculative_config)
    if speculation is None or speculation.model is None:
        return None
    return read_facts(replace(intent, model=speculation.model, tokenizer=None))
