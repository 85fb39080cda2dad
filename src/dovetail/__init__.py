"""Dovetail runs and serves large language models on any hardware.

::

    from dovetail import LLM, SamplingParams

    llm = LLM()  # the bundled demonstration model
    for output in llm.generate(["def main():"], SamplingParams(temperature=0, max_tokens=32)):
        print(output.outputs[0].text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.core.config.schema import EngineConfig
    from dovetail.core.constraint import StructuredOutputsParams
    from dovetail.core.engine.async_engine import AsyncEngine
    from dovetail.core.engine.beam_search import BeamSearchOutput, BeamSearchParams
    from dovetail.core.errors import DovetailError
    from dovetail.core.llm import LLM
    from dovetail.core.request import (
        CompletionOutput,
        Logprob,
        PromptTokens,
        RequestOutput,
        SamplingParams,
    )

__all__ = [
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "DovetailError",
    "EngineConfig",
    "LLM",
    "Logprob",
    "PromptTokens",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngine": "dovetail.core.engine.async_engine",
    "BeamSearchOutput": "dovetail.core.engine.beam_search",
    "BeamSearchParams": "dovetail.core.engine.beam_search",
    "CompletionOutput": "dovetail.core.request",
    "DovetailError": "dovetail.core.errors",
    "EngineConfig": "dovetail.core.config.schema",
    "LLM": "dovetail.core.llm",
    "Logprob": "dovetail.core.request",
    "PromptTokens": "dovetail.core.request",
    "RequestOutput": "dovetail.core.request",
    "SamplingParams": "dovetail.core.request",
    "StructuredOutputsParams": "dovetail.core.constraint",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that ``import dovetail`` is fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dovetail' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
