"""From an architecture's name to the library's class for it, or the reason why it cannot serve."""

from __future__ import annotations

import sys
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.errors import CheckpointError, UnsupportedError
from dovetail.platforms.torch.library import older

__all__ = ["find_class"]

_AUTO_CLASS = "AutoModelForCausalLM"
_ATTENDING = frozenset({"full_attention", "sliding_attention"})
"""Entries of ``layer_types`` whose layers keep keys and values, and nothing else."""


def find_class(name: str, config: RunnerConfig) -> tuple[Any, Any]:
    """The class of a causal language model, and the library's config of the checkpoint.

    Args:
        name: The architecture, as ``config.json`` names it.
        config: The folder, and whether code in it may run.

    Raises:
        CheckpointError: The library does not understand ``config.json``.
        UnsupportedError: It has no such model, or one that paged attention cannot serve.
    """
    own = _AUTO_CLASS in config.hf_config.get("auto_map", {})
    known = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if own and not known and not config.trust_remote_code:
        raise UnsupportedError(
            "its code is in the model's folder, not in the transformers library; read it, and run"
            " it with --trust-remote-code if you trust it"
        )
    if not known and not own:
        raise UnsupportedError(
            f"transformers {transformers.__version__} has no causal language model of that name"
        )
    library_config = _read_config(config)
    if known:
        model_class = getattr(transformers, name)
    else:
        place = config.hf_config["auto_map"][_AUTO_CLASS]
        model_class = get_class_from_dynamic_module(place, str(config.model_path))
    reason = _refuses(name, model_class, library_config)
    if reason is not None:
        raise UnsupportedError(reason)
    return model_class, library_config


def _read_config(config: RunnerConfig) -> Any:
    try:
        return AutoConfig.from_pretrained(
            config.model_path, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot read"
            f" {config.model_path / 'config.json'}: {str(error).splitlines()[0]:.200}"
        ) from error


def _refuses(name: str, model_class: Any, library_config: Any) -> str | None:
    """What can be told before the weights are read."""
    text = library_config.get_text_config(decoder=True)
    if library_config.is_encoder_decoder:
        return "it is an encoder with a decoder"
    other = sorted(set(getattr(text, "layer_types", None) or ()) - _ATTENDING)
    if other:
        return f"it has layers of the kind {', '.join(other)}, which paged attention does not know"
    if model_class._is_stateful:
        return "its layers keep a recurrent state, not keys and values"
    if not getattr(text, "is_causal", True):
        return "its attention is not causal"
    module = sys.modules[model_class.__module__]
    calls = hasattr(module, "ALL_ATTENTION_FUNCTIONS") or model_class._supports_attention_backend
    if not calls and name not in older.ARCHITECTURES:
        return "its layers do not call the library's attention interface"
    return None
