"""From what the user wants to what is done: intent, facts, decisions with their reasons."""

from __future__ import annotations

from dovetail.core.config.cache import fit_cache, readable_bytes
from dovetail.core.config.checkpoint import ModelFacts, read_facts
from dovetail.core.config.env import Environment, read_environment, with_environment
from dovetail.core.config.option import Option, options_of
from dovetail.core.config.resolve import PlatformView, resolve
from dovetail.core.config.resolved import CachePlan, ResolvedConfig
from dovetail.core.config.schema import EngineConfig, engine_options

__all__ = [
    "CachePlan",
    "EngineConfig",
    "Environment",
    "ModelFacts",
    "Option",
    "PlatformView",
    "ResolvedConfig",
    "engine_options",
    "fit_cache",
    "options_of",
    "read_environment",
    "read_facts",
    "readable_bytes",
    "resolve",
    "with_environment",
]
