"""Tiny random checkpoints, saved by the real transformers classes, for tests of any layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

__all__ = ["FAMILIES", "VOCAB_SIZE", "make_checkpoint", "make_tokenizer"]

VOCAB_SIZE = 384
"""Tokens of the tokenizer and width of every model's logits."""

BOS, EOS, PAD = 0, 1, 2
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>", "<unk>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
_TEXT = (
    "the quick brown fox jumps over the lazy dog while a small model learns to write one word "
    "after another; it reads what was written, thinks about what comes next, and says so. "
    "Hello there, how are you today? I am well, thank you. Tell me a story about the sea. "
    "Once upon a time there was a ship that sailed around the world with seven brave sailors. "
    "def main(argument): return [value for value in argument if value is not None] "
    "Paris is the capital of France, Rome is the capital of Italy, and Madrid that of Spain."
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_GATED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 96}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "mistral": {**_GATED, "sliding_window": None},
    "qwen2": _GATED,
    "qwen3": {**_GATED, "head_dim": 16},
    "phi3": {**_GATED, "original_max_position_embeddings": 512},
    "gemma2": {**_GATED, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 32},
    "opt": {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt2": {**_COMMON, "n_inner": 96},
}
"""Config of each family; ``make_checkpoint`` takes overrides."""


def make_checkpoint(
    family: str,
    path: Path | str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Save a random model and a tokenizer under ``path``; returns the path.

    Args:
        family: A key of ``FAMILIES``.
        path: The folder; it is made if it does not exist.
        seed: Every weight is a function of this.
        dtype: Of the weights in the file: ``float32``, ``bfloat16`` or ``float16``.
        max_shard_size: Smaller than the model (such as ``"50KB"``) gives a sharded checkpoint.
        overrides: Config values of this family, by the names of its transformers config class.
    """
    path = Path(path)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer(config.max_position_embeddings).save_pretrained(path)
    return path


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter values that matter: no bias is zero and no norm is the identity.

    Norm weights have random signs, so that a model whose embedding is also its output layer does
    not simply repeat its last token; matrices are drawn wide for the same reason.
    """
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.dim() == 2:
            parameter.copy_(0.2 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        else:
            stored_less_one = not bool(parameter.any())
            parameter.copy_(noise.sign() + 0.1 * noise - float(stored_less_one))


def make_tokenizer(model_max_length: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCAB_SIZE`` tokens with a chat template; adds ``<s>`` in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _lines() -> Iterator[str]:
    yield from _TEXT.split(". ")
