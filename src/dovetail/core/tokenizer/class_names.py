"""Which of the transformers library's tokenizer classes a model folder gets.

Follows ``AutoTokenizer`` of transformers 5.23; a test compares the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["AS_IN_FILE", "class_name"]

AS_IN_FILE = "TokenizersBackend"
"""The class that takes ``tokenizer.json`` as it is."""

_SAME_AS_FILE = frozenset(
    {
        "TokenizersBackend",
        "PythonBackend",
        "PreTrainedTokenizer",
        "MistralCommonBackend",
        "BloomTokenizer",
    }
)
_MODELS_AS_IN_FILE = """
    EvollaModel arctic aria beam bigbird_pegasus camembertv2-base canary chatlm cohere_asr ernie4_5
    ernie4_5_moe flex_olmo fuyu glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm_image glmasr
    got_ocr2 gpt_bigcode gradium_phonon_tts granite granitemoe granitemoehybrid granitemoeshared
    h2ovl_chat hyperclovax hyperclovax_vlm internlm2 internlm3 iquestcoder jamba kimi_k25
    kimi_linear kosmos-2 llava llava_next mimo_v2_flash minicpm3 minicpm_ocr minicpmv minicpmv4_6
    minicpmv4_7 minimax_m2 ministral ministral3 mistral mistral3 mistral_large4 mixtral modernbert
    modernbert-decoder molmo molmo2 nemo_speechlm nemotron nvfp4 nystromformer olmo2 olmo3
    olmo_hybrid opencua openvla paddleocr_vl pegasus_x persimmon phi3 phi3_v phimoe pix2struct
    pixtral pocket_tts smolvlm stablelm step3_vl umt5 vipllava voxtral voxtral_realtime
    xlm-roberta-xl
"""
"""Model types whose ``tokenizer_class`` is overruled by ``AS_IN_FILE``."""

_CLASS_OF_MODEL = {
    "hyperclovax_vision_v2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3_5": "Qwen3_5Tokenizer",
    "qwen3_5_moe": "Qwen3_5Tokenizer",
    "qwen3_5_moe_text": "Qwen3_5Tokenizer",
    "qwen4_exp": "Qwen3_5Tokenizer",
    "siglip2": "Siglip2Tokenizer",
}
"""Model types whose ``tokenizer_class`` is overruled by this one."""


def models_as_in_file() -> frozenset[str]:
    """Model types whose ``tokenizer_class`` is overruled by ``AS_IN_FILE``."""
    return frozenset(_MODELS_AS_IN_FILE.split())


def class_name(
    config: Mapping[str, Any], model: Mapping[str, Any], has_byte_level: bool
) -> str | None:
    """The class for a folder with ``tokenizer.json``; None if that cannot be told from here.

    Args:
        config: ``tokenizer_config.json``.
        model: ``config.json``.
        has_byte_level: Whether ``tokenizer.json`` speaks of ``ByteLevel``.
    """
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    model_type = model.get("model_type")
    if declared is None:
        return None if model_type else AS_IN_FILE
    name = str(declared).removesuffix("Fast")
    if model_type in models_as_in_file():
        return AS_IN_FILE
    if model_type in _CLASS_OF_MODEL:
        return _CLASS_OF_MODEL[model_type]
    if name in _SAME_AS_FILE:
        return AS_IN_FILE
    if name == "LlamaTokenizer" and has_byte_level:
        return AS_IN_FILE
    return name
