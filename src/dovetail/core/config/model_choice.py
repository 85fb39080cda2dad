"""Whose code computes the model, from which weights, on how many devices, with which guesses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dovetail.core.config.checkpoint import ModelFacts, weights_hint
from dovetail.core.config.resolved import DraftModel
from dovetail.core.config.schema import EngineConfig
from dovetail.core.config.speculative import SpeculativeConfig
from dovetail.core.errors import CheckpointError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from dovetail.core.contracts.platform import Adjustment, Capabilities

__all__ = ["PlatformView", "decide_model", "decide_speculation", "tensor_parallel"]


class PlatformView(Protocol):
    """The part of a platform that decisions depend on."""

    @property
    def name(self) -> str:
        """As ``--device`` names it."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        ...

    def adjust(self, settings: Mapping[str, Any]) -> list[Adjustment]:
        """The changes that it needs to the resolved settings, by field name."""
        ...


def decide_model(
    intent: EngineConfig,
    facts: ModelFacts,
    platform: PlatformView,
    native: bool,
    known: Collection[str],
    schemes: Collection[str],
    reasons: dict[str, str],
) -> dict[str, Any]:
    """Whose code computes the model, and where its weights come from."""
    if intent.load_format != "dummy" and not facts.has_weights:
        raise CheckpointError(
            f"{facts.path} holds no *.safetensors files{weights_hint(facts.path)};"
            " load_format=dummy runs with random weights"
        )
    architecture = facts.architectures[0]
    model_impl = _model_impl(intent, architecture, platform, native, known, reasons)
    return {
        "architecture": architecture,
        "model_impl": model_impl,
        "deterministic": _deterministic(intent, architecture, model_impl, platform),
        "load_format": "dummy" if intent.load_format == "dummy" else "safetensors",
        "quantization": _quantization(intent, facts, platform, schemes, reasons),
    }


def _model_impl(
    intent: EngineConfig,
    architecture: str,
    platform: PlatformView,
    native: bool,
    known: Collection[str],
    reasons: dict[str, str],
) -> str:
    breadth = "transformers_models" in platform.capabilities.features
    natively_known = f"Dovetail's own architectures are {', '.join(sorted(known)) or 'none'}"
    if intent.model_impl == "native" and not native:
        raise UnsupportedError(
            f"model_impl=native: {architecture} is not one of them; {natively_known}"
        )
    if intent.model_impl == "transformers" and not breadth:
        raise UnsupportedError(
            f"model_impl=transformers: platform {platform.name} does not run the transformers"
            " library's models; leave model_impl at auto"
        )
    if intent.model_impl != "auto":
        return intent.model_impl
    if native:
        return "native"
    if not breadth:
        raise UnsupportedError(
            f"platform {platform.name} cannot run {architecture}: it does not run the transformers"
            f" library's models, and {natively_known}"
        )
    reasons["model_impl"] = f"Dovetail has no {architecture} of its own"
    return "transformers"


def _deterministic(
    intent: EngineConfig, architecture: str, model_impl: str, platform: PlatformView
) -> bool:
    if intent.deterministic and "deterministic" not in platform.capabilities.features:
        raise UnsupportedError(
            f"deterministic: on platform {platform.name} a request's logits depend on what else is"
            " in the step; leave it out, or choose another platform"
        )
    if intent.deterministic and model_impl == "transformers":
        raise UnsupportedError(
            f"deterministic: the transformers library's code computes {architecture}, and nothing"
            " is known about its order of summation; only native models can be deterministic"
        )
    return intent.deterministic


def tensor_parallel(intent: EngineConfig, platform: PlatformView) -> int:
    """Devices that share every layer. Raises UnsupportedError."""
    size = intent.tensor_parallel_size
    if size > 1 and "tensor_parallel" not in platform.capabilities.features:
        raise UnsupportedError(
            f"tensor_parallel_size={size}: platform {platform.name} runs a model on one device"
        )
    return size


def _quantization(
    intent: EngineConfig,
    facts: ModelFacts,
    platform: PlatformView,
    schemes: Collection[str],
    reasons: dict[str, str],
) -> str | None:
    wish, stored = intent.quantization, facts.quantization
    if wish and stored and wish != stored:
        raise ConfigError(f"quantization={wish}: the checkpoint is quantized with {stored}")
    scheme = wish or stored
    if scheme is None:
        return None
    otherwise = "leave it out" if wish else "choose a checkpoint without quantization"
    if "quantization" not in platform.capabilities.features:
        raise UnsupportedError(
            f"quantization {scheme}: platform {platform.name} runs no quantized layers; {otherwise}"
        )
    if scheme not in schemes:
        raise UnsupportedError(
            f"quantization {scheme}: no such scheme is installed; there are"
            f" {', '.join(sorted(schemes)) or 'none'}; {otherwise}"
        )
    if intent.deterministic:
        raise UnsupportedError(
            f"quantization {scheme}: nothing is known about the order of its sums, so it cannot be"
            f" deterministic; {otherwise}"
        )
    if not wish:
        reasons["quantization"] = "the checkpoint is stored so"
    return scheme


def decide_speculation(
    intent: EngineConfig,
    draft: ModelFacts | None,
    platform: PlatformView,
    known: Collection[str],
) -> dict[str, Any]:
    """What guesses ahead, and the draft model. Raises UnsupportedError and CheckpointError."""
    speculation = SpeculativeConfig.parse(intent.speculative_config)
    if speculation is None:
        return {}
    features = platform.capabilities.features
    if "speculation" not in features:
        raise UnsupportedError(
            f"speculative_config: platform {platform.name} does not check drafts; leave it out"
        )
    if draft is None:
        return {"speculation": speculation}
    if "draft_model" not in features:
        raise UnsupportedError(
            f"speculative_config: platform {platform.name} runs no draft model; the methods ngram"
            " and suffix need none"
        )
    if not draft.has_weights and intent.load_format != "dummy":
        raise CheckpointError(f"{draft.path} holds no *.safetensors files for a draft model")
    native = any(name in known for name in draft.architectures)
    if not native and "transformers_models" not in features:
        raise UnsupportedError(
            f"speculative_config: platform {platform.name} cannot run {draft.architectures[0]}"
        )
    impl: Literal["native", "transformers"] = "native" if native else "transformers"
    model = DraftModel(path=draft.path, hf_config=draft.hf_config, model_impl=impl)
    return {"speculation": speculation, "draft": model}
