"""What the transformers library's tokenizer classes make of ``tokenizer.json``.

Some of them take only the vocabulary from it and build the rest of the pipeline themselves. The
classes of the most usual models are described here, so that those need no transformers; any other
class is left to it. Follows transformers 5.23; a test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from dovetail.core.tokenizer.class_names import AS_IN_FILE

__all__ = ["LAYOUTS", "Layout", "UnknownLayoutError"]

Config: TypeAlias = Mapping[str, Any]


class UnknownLayoutError(Exception):
    """It is not known here how the transformers library would read this folder."""


def _keep(backend: Tokenizer, config: Config) -> None:
    """Change nothing."""


@dataclass(frozen=True)
class Layout:
    """What a tokenizer class does to what ``tokenizer.json`` says."""

    model: type | None = None
    """The one kind of model that it takes; None for any."""
    build: Callable[[Tokenizer, Config], None] = _keep
    """Replaces parts of the pipeline."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Those that the class assumes if the folder does not name them."""
    add_all_special: bool = False
    """Whether special tokens lose what the folder says of white space around them."""
    finish: Callable[[Tokenizer, Mapping[str, str]], None] | None = None
    """Sets the post-processor, given the named special tokens."""


def _llama(backend: Tokenizer, config: Config) -> None:
    add_space = config.get("add_prefix_space")
    add_space = True if add_space is None else bool(add_space)
    scheme = "always" if config.get("legacy", False) else "first"
    model: Any = backend.model
    model.fuse_unk, model.byte_fallback, model.unk_token = True, True, None
    model.dropout, model.ignore_merges = None, False
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=scheme if add_space else "never", split=False
    )
    strip = [decoders.Strip(content=" ", left=1)] if add_space else []
    backend.decoder = _sentencepiece_decoder(strip)


def _gemma(backend: Tokenizer, config: Config) -> None:
    unk = config.get("unk_token", "<unk>")
    model: Any = backend.model
    model.fuse_unk, model.byte_fallback = True, True
    model.unk_token = unk["content"] if isinstance(unk, dict) else str(unk)
    model.dropout, model.ignore_merges = None, False
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = _sentencepiece_decoder([])


def _sentencepiece_decoder(more: list[Any]) -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more]
    )


def _byte_level_model(backend: Tokenizer) -> None:
    model: Any = backend.model
    model.fuse_unk, model.byte_fallback, model.unk_token = False, False, None
    model.dropout, model.ignore_merges = None, False
    backend.decoder = decoders.ByteLevel()


def _gpt2(backend: Tokenizer, config: Config) -> None:
    _byte_level_model(backend)
    add_space = bool(config.get("add_prefix_space", False))
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_space)


def _gpt_neox(backend: Tokenizer, config: Config) -> None:
    _gpt2(backend, config)
    backend.normalizer = normalizers.NFC()


def _qwen(pattern: str) -> Callable[[Tokenizer, Config], None]:
    def build(backend: Tokenizer, config: Config) -> None:
        _byte_level_model(backend)
        add_space = bool(config.get("add_prefix_space"))
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=add_space, use_regex=False),
            ]
        )

    return build


def _bert(backend: Tokenizer, config: Config) -> None:
    model: Any = backend.model
    unk = config.get("unk_token", "[UNK]")
    model.unk_token = unk["content"] if isinstance(unk, dict) else str(unk)
    model.continuing_subword_prefix, model.max_input_chars_per_word = "##", 100
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")


def _bert_frame(backend: Tokenizer, named: Mapping[str, str]) -> None:
    if not {"cls_token", "sep_token"} <= named.keys():
        raise UnknownLayoutError("no tokens to frame a text with")
    cls, sep = named["cls_token"], named["sep_token"]
    ids = [(token, backend.token_to_id(token)) for token in (cls, sep)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=ids,
    )


def _no_frame(backend: Tokenizer, named: Mapping[str, str]) -> None:
    backend.post_processor = processors.TemplateProcessing(single="$A:0", special_tokens=[])


_END = "<|endoftext|>"
_QWEN_SPECIAL = {"unk_token": _END, "eos_token": _END, "pad_token": _END}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LAYOUTS: Mapping[str, Layout] = {
    AS_IN_FILE: Layout(),
    "LlamaTokenizer": Layout(
        models.BPE, _llama, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    ),
    "GemmaTokenizer": Layout(
        models.BPE,
        _gemma,
        {
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
    ),
    "GPT2Tokenizer": Layout(
        models.BPE, _gpt2, {"unk_token": _END, "bos_token": _END, "eos_token": _END}
    ),
    "GPTNeoXTokenizer": Layout(
        models.BPE,
        _gpt_neox,
        {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": "<|padding|>"},
        finish=_no_frame,
    ),
    "Qwen2Tokenizer": Layout(models.BPE, _qwen(_QWEN2), _QWEN_SPECIAL, add_all_special=True),
    "Qwen3_5Tokenizer": Layout(models.BPE, _qwen(_QWEN3_5), _QWEN_SPECIAL),
    "BertTokenizer": Layout(
        models.WordPiece,
        _bert,
        {
            "unk_token": "[UNK]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "mask_token": "[MASK]",
        },
        finish=_bert_frame,
    ),
}
"""By class name; those that are not here are left to the transformers library."""
