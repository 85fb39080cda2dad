from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto import tokenization_auto

from dovetail.core.errors import CheckpointError, ConfigError
from dovetail.core.tokenizer import load_tokenizer
from dovetail.core.tokenizer.class_names import _CLASS_OF_MODEL, class_name, models_as_in_file
from dovetail.core.tokenizer.fast import FastTokenizer
from dovetail.core.tokenizer.files import TokenizerFiles
from dovetail.core.tokenizer.layouts import UnknownLayoutError
from dovetail.core.tokenizer.slow import SlowTokenizer
from tests.core.tokenizer.folders import (
    TEXTS,
    bert,
    gpt2,
    llama2,
    llama3,
    old_files,
    qwen2,
    unigram,
)


def change(folder: Path, **settings: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def test_the_usual_case_imports_neither_transformers_nor_torch(tmp_path: Path) -> None:
    folder = llama3(tmp_path)
    code = (
        "import sys; from dovetail.core.tokenizer import load_tokenizer;"
        f"t = load_tokenizer({str(folder)!r});"
        "t.apply_chat_template([{'role': 'user', 'content': 'x'}], chat_template='y');"
        "t.new_stream().step(t.encode('x'));"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_slow_and_fast_agree(tmp_path: Path) -> None:
    for make in (llama3, llama2):
        folder = make(tmp_path / make.__name__)
        fast, slow = load_tokenizer(folder), load_tokenizer(folder, mode="slow")
        assert isinstance(fast, FastTokenizer)
        assert isinstance(slow, SlowTokenizer)
        names = (
            "bos_token",
            "eos_token",
            "pad_token",
            "eos_token_id",
            "vocab_size",
            "chat_template",
        )
        assert [getattr(fast, n) for n in names] == [getattr(slow, n) for n in names]
        assert fast.special_tokens == slow.special_tokens
        assert fast.special_token_ids <= slow.special_token_ids
        for text in TEXTS:
            ids = fast.encode(text)
            assert slow.encode(text) == ids
            assert slow.decode(ids) == fast.decode(ids)
            streams = fast.new_stream(ids[:3]), slow.new_stream(ids[:3])
            texts = ["".join(s.step([i]) for i in ids[3:]) + s.flush() for s in streams]
            assert texts[0] == texts[1]
        assert slow.encode("a\ud83db") == fast.encode("a\ud83db")


def test_slow_names_tokens(tmp_path: Path) -> None:
    slow = load_tokenizer(llama2(tmp_path / "llama2"), mode="slow")
    fast = load_tokenizer(tmp_path / "llama2")
    for token_id in range(0, fast.vocab_size, 7):
        assert slow.token_bytes(token_id) == fast.token_bytes(token_id)
    assert slow.token_text(fast.encode("the quick")[-1]) == fast.token_text(
        fast.encode("the quick")[-1]
    )


def test_slow_lays_out_conversations(tmp_path: Path) -> None:
    folder = change(llama3(tmp_path), chat_template="{{ bos_token }}{{ messages[0].content }}")
    slow = load_tokenizer(folder, mode="slow")
    assert slow.apply_chat_template([{"role": "user", "content": "x"}]) == "<|begin_of_text|>x"


def test_files_without_tokenizer_json(tmp_path: Path) -> None:
    """A vocabulary and merges, as GPT-2 was published."""
    model = json.loads((gpt2(tmp_path) / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, SlowTokenizer)
    assert tokenizer.decode(tokenizer.encode("the quick fox 你好")) == "the quick fox 你好"


@pytest.mark.parametrize(
    "settings",
    [
        {"split_special_tokens": True},
        {"tokenizer_class": "CodeGenTokenizer"},
        {"tokenizer_class": None},
        {"fix_mistral_regex": True},
        {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True},
    ],
)
def test_settings_that_are_left_to_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert isinstance(load_tokenizer(change(gpt2(tmp_path), **settings)), SlowTokenizer)


def test_other_added_tokens_than_in_the_file_are_left_to_transformers(tmp_path: Path) -> None:
    folder = qwen2(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"].popitem()
    assert isinstance(load_tokenizer(change(folder, **config)), SlowTokenizer)


@pytest.mark.parametrize(
    ("make", "name", "content", "reason"),
    [
        (unigram, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}, "Unigram"),
        (gpt2, "tokenizer_config.json", {"tokenizer_class": "NoSuchTokenizer"}, "NoSuchTokenizer"),
        (old_files, "added_tokens.json", {"<new>": 9}, "added_tokens.json"),
        (old_files, "special_tokens_map.json", {"extra_special_tokens": []}, "special_tokens_map"),
        (llama3, "tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "decoder"),
        (llama3, "tokenizer_config.json", {"added_tokens_decoder": []}, "list"),
        (llama3, "tokenizer_config.json", {"extra_special_tokens": 3}, "int"),
        (llama2, "tokenizer_config.json", {"bos_token": {"content": "<s>"}}, "AddedToken"),
        (bert, "tokenizer_config.json", {"cls_token": None}, "frame"),
    ],
)
def test_what_is_not_known_is_not_guessed(
    tmp_path: Path, make: Callable[[Path], Path], name: str, content: dict[str, Any], reason: str
) -> None:
    folder = make(tmp_path)
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    with pytest.raises(UnknownLayoutError, match=reason):
        FastTokenizer(TokenizerFiles.read(folder))


def test_there_are_two_modes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="auto or slow"):
        load_tokenizer(llama3(tmp_path), mode="fast")


def test_no_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json.*tokenizer\.model.*skip_tokenizer_init"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="no such model folder"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", '"x"', "\xff"])
def test_broken_files(tmp_path: Path, name: str, content: str) -> None:
    folder = llama3(tmp_path)
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(folder)


def test_foreign_code_needs_trust(tmp_path: Path) -> None:
    code = (
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast):\n"
        "    def apply_chat_template(self, messages, **kwargs):\n"
        "        return self.encode(messages[0]['content'], add_special_tokens=False)\n"
    )
    folder = change(
        llama3(tmp_path), tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]}
    )
    (folder / "own.py").write_text(code)
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        load_tokenizer(folder)
    trusted = load_tokenizer(folder, trust_remote_code=True)
    ids = trusted.apply_chat_template([{"role": "user", "content": "the fox"}])
    assert ids == trusted.encode("the fox", add_special_tokens=False)


def test_the_table_of_classes_is_that_of_transformers() -> None:
    registered = {
        name: (cls or "").removesuffix("Fast")
        for name, cls in tokenization_auto.TOKENIZER_MAPPING_NAMES.items()
    }
    as_file = {"TokenizersBackend", "PythonBackend", "PreTrainedTokenizer", "MistralCommonBackend"}
    assert models_as_in_file() == {name for name, cls in registered.items() if cls in as_file}
    overruled = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    expected = {n: registered[n] for n in overruled if registered[n] not in as_file}
    assert expected == _CLASS_OF_MODEL


@pytest.mark.parametrize(
    ("declared", "model_type", "has_byte_level", "expected"),
    [
        ("LlamaTokenizerFast", "llama", False, "LlamaTokenizer"),
        ("LlamaTokenizerFast", "llama", True, "TokenizersBackend"),
        ("LlamaTokenizer", "mistral", False, "TokenizersBackend"),
        ("LlamaTokenizerFast", "qwen2", True, "Qwen2Tokenizer"),
        ("PreTrainedTokenizerFast", "llama", True, "TokenizersBackend"),
        ("PreTrainedTokenizerFast", None, True, "TokenizersBackend"),
        (None, None, False, "TokenizersBackend"),
        (None, "llama", False, None),
        ("CohereTokenizerFast", "cohere", True, "CohereTokenizer"),
    ],
)
def test_class_name(
    declared: str | None, model_type: str | None, has_byte_level: bool, expected: str | None
) -> None:
    config = {"tokenizer_class": declared}
    assert class_name(config, {"model_type": model_type}, has_byte_level) == expected
