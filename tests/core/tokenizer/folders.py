"""Small model folders with tokenizers of every usual kind, made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "",
    " ",
    "  \n\t two  spaces \r\n\r\n",
    "Hello world, how are you? I'm fine; you've no idea. It 's n't so !",
    " leading and trailing ",
    "def main(argument):\n\treturn [value for value in argument if value != 3.1415]\n",
    "naïve café déjà vu e\u0301 ﬁ ① ½ Å",
    "日本語のテキストと中文文本和한국어",
    "Привет мир, สวัสดีชาวโลก, שלום, مرحبا بالعالم",
    "👋🏽 family 👨‍👩‍👧‍👦 flag 🇨🇭 🤖",
    "1234567890 12,345.67 0x1F",
    "<s>text</s> <unk> <pad> <0x41> ▁x ## [SEP] [CLS]",
    "<|endoftext|>a <|endoftext|> b<|im_start|>user\nhi<|im_end|> <|tool|>x",
    "\x00\x01\x7f\u200b\ufeff\ufffd",
    "the quick brown fox",
]
_TRAINING = [*TEXTS, "the quick brown fox jumps over the lazy dog and the dog sleeps " * 3]

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def special(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, special=True, normalized=False, **flags)


def write(folder: Path, backend: Tokenizer, config: dict[str, Any], model_type: str) -> Path:
    """A model folder with this tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def declared(backend: Tokenizer) -> dict[str, Any]:
    """The added tokens as ``tokenizer_config.json`` has them."""
    return {
        str(i): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for i, token in backend.get_added_tokens_decoder().items()
    }


def byte_level(pre_tokenizer: Any, size: int = 600) -> Tokenizer:
    """BPE over bytes, without special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(_TRAINING, trainer)
    return backend


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sentencepiece(size: int = 560, *, bytes_too: bool = True) -> Tokenizer:
    """BPE over characters with U+2581 for spaces, and bytes for unknown characters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 259, limit_alphabet=60, initial_alphabet=["▁"], show_progress=False
    )
    trained.train_from_iterator(_TRAINING[-1:] + TEXTS[3:6], trainer)
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>"]
    if bytes_too:
        names += [f"<0x{byte:02X}>" for byte in range(256)]
    names += [name for name in model["vocab"] if name not in names]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    backend = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens([special("<unk>"), special("<s>"), special("</s>")])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


SENTENCEPIECE_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def gpt2(folder: Path) -> Path:
    backend = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.add_special_tokens([special("<|endoftext|>")])
    return write(folder, backend, {"tokenizer_class": "GPT2Tokenizer"}, "gpt2")


def gpt_neox(folder: Path) -> Path:
    backend = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.add_special_tokens([special("<|endoftext|>")])
    backend.add_tokens([AddedToken("    ", normalized=True)])
    config = {"tokenizer_class": "GPTNeoXTokenizer", "bos_token": "<|endoftext|>"}
    return write(folder, backend, config, "gpt_neox")


def qwen2(folder: Path) -> Path:
    backend = byte_level(split(QWEN))
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(
        [special(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    backend.add_tokens([AddedToken("<|tool|>", normalized=False)])
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": declared(backend),
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_bos_token": False,
        "split_special_tokens": False,
    }
    return write(folder, backend, config, "qwen3")


def llama3(folder: Path) -> Path:
    backend = byte_level(split(LLAMA3))
    backend.model.ignore_merges = True
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_start|>"]
    backend.add_special_tokens([special(name) for name in names])
    backend.add_tokens([AddedToken("中文", normalized=False)])
    start = backend.token_to_id(names[0])
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{names[0]} $A",
                pair=f"{names[0]} $A {names[0]} $B:1",
                special_tokens=[(names[0], start)],
            ),
        ]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": declared(backend),
        "bos_token": names[0],
        "eos_token": names[2],
        "clean_up_tokenization_spaces": True,
    }
    return write(folder, backend, config, "llama")


def llama2(folder: Path, **settings: Any) -> Path:
    backend = sentencepiece()
    backend.add_special_tokens([special("<pad>", rstrip=True)])
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": declared(backend),
        "add_bos_token": True,
        "add_eos_token": True,
        "legacy": False,
        **SENTENCEPIECE_NAMES,
        **settings,
    }
    return write(folder, backend, config, "llama")


def qwen3_5(folder: Path) -> Path:
    """Another pattern than in the file, by the type of the model."""
    qwen2(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3_5_text"}')
    return folder


def distilled(folder: Path) -> Path:
    """A Llama tokenizer in a Qwen model, for which transformers takes Qwen's class."""
    llama3(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "LlamaTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return folder


def mistral(folder: Path) -> Path:
    """As Llama 2, but transformers takes the file as it is for this model type."""
    llama2(folder, additional_special_tokens=["[TOOL]"], pad_token="<padding>")
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    return folder


def deepseek(folder: Path) -> Path:
    """Says LlamaTokenizer, but is byte-level."""
    backend = byte_level(split(LLAMA3))
    backend.add_special_tokens([special("<s>"), special("</s>")])
    named = {
        key: {"__type": "AddedToken", "content": text, "normalized": True, "special": False}
        for key, text in {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}.items()
    }
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, **named}
    return write(folder, backend, config, "llama")


def gemma(folder: Path) -> Path:
    backend = sentencepiece()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([special("<pad>"), special("<mask>")])
    config = {"tokenizer_class": "GemmaTokenizer", "image_token": "<img>", **SENTENCEPIECE_NAMES}
    return write(folder, backend, config, "gemma2")


def bert(folder: Path) -> Path:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=names, show_progress=False, initial_alphabet=["a", "b"]
    )
    backend.train_from_iterator(_TRAINING, trainer)
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    return write(folder, backend, config, "bert")


def word_piece(folder: Path) -> Path:
    """WordPiece as it is in the file, with clean-up, for which there is no byte table."""
    bert(folder)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": True,
        "eos_token": "[SEP]",
        "extra_special_tokens": ["<|im_start|>"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def unigram(folder: Path) -> Path:
    """Unigram, as T5 has it, with padding and truncation set in the file."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(_TRAINING, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(pad_id=1, pad_token="</s>", length=8)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    return write(folder, backend, config, "some-model")


def old_files(folder: Path) -> Path:
    """No ``added_tokens_decoder``, but ``special_tokens_map.json`` and ``added_tokens.json``."""
    backend = sentencepiece()
    backend.add_tokens([AddedToken("<|tool|>", normalized=True, special=False)])
    write(folder, backend, {"tokenizer_class": "PreTrainedTokenizerFast"}, "mixtral")
    names = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": True, "normalized": True, "rstrip": False},
        "additional_special_tokens": ["<|im_start|>"],
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    added = {"<|tool|>": backend.token_to_id("<|tool|>")}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def grown(folder: Path) -> Path:
    """``tokenizer_config.json`` declares tokens that ``tokenizer.json`` lacks or has otherwise."""
    backend = sentencepiece()
    tokens = declared(backend)
    tokens["1"]["rstrip"] = True
    new = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    size = backend.get_vocab_size()
    tokens[str(size)] = {"content": "<|tool|>", "special": False, **new}
    tokens[str(size + 1)] = {"content": "<|im_start|>", "special": True, **new}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": tokens,
        "eos_token": "</s>",
        "pad_token": "<|tool|>",
    }
    return write(folder, backend, config, "mistral")


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "qwen2": qwen2,
    "qwen3_5": qwen3_5,
    "distilled": distilled,
    "llama3": llama3,
    "llama2": llama2,
    "llama2-legacy": lambda folder: llama2(folder, legacy=True),
    "llama2-no-space": lambda folder: llama2(folder, add_prefix_space=False, legacy=None),
    "mistral": mistral,
    "deepseek": deepseek,
    "gemma": gemma,
    "bert": bert,
    "word_piece": word_piece,
    "unigram": unigram,
    "old_files": old_files,
    "grown": grown,
}
