"""The bundled demonstration model is complete, small, loadable and completes Python."""

from __future__ import annotations

import ast
import json
import re
import struct
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail.core.demo import DEMO_MODEL_DESCRIPTION, DEMO_MODEL_NAME, demo_model_path

MAX_TOTAL_BYTES = 8_000_000


def read_json(name: str) -> dict[str, Any]:
    """Contents of one of the model's JSON files."""
    contents: dict[str, Any] = json.loads((demo_model_path() / name).read_text(encoding="utf-8"))
    return contents


def safetensors_header() -> dict[str, Any]:
    """The JSON header of the weight file: its metadata and one entry for each tensor."""
    with (demo_model_path() / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    return header


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The tokenizer as transformers loads it."""
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    """The model as transformers loads it, in the data type it is stored in."""
    return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype="auto")


def complete(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 48) -> str:
    """The greedy continuation of `prompt`, without the prompt."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    continuation: str = tokenizer.decode(
        output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True
    )
    return continuation


def test_description_names_the_number_of_parameters() -> None:
    """The one-line description agrees with the weights."""
    parameters = 0
    for name, entry in safetensors_header().items():
        if name != "__metadata__":
            size = 1
            for dimension in entry["shape"]:
                size *= dimension
            parameters += size
    assert f"{parameters / 1e6:.1f} M parameter" in DEMO_MODEL_DESCRIPTION
    assert "\n" not in DEMO_MODEL_DESCRIPTION
    assert DEMO_MODEL_NAME == "dovetail-demo"


def test_files_are_complete_and_small() -> None:
    """All files a loader looks for are there, readable by everyone, within 8 MB in total."""
    files = [path for path in demo_model_path().rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in files) <= MAX_TOTAL_BYTES
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_config_is_llama() -> None:
    """The configuration describes a grouped-query Llama model with tied embeddings."""
    config = read_json("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 1024
    assert config["eos_token_id"] == read_json("generation_config.json")["eos_token_id"]


def test_weights_are_bfloat16_and_hold_no_paths() -> None:
    """The weight file's metadata is the format name alone; no file mentions a local path."""
    header = safetensors_header()
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert "lm_head.weight" not in header
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "README.md"):
        text = (demo_model_path() / name).read_text(encoding="utf-8")
        assert not re.search(r"/(?:home|root|tmp|work|usr|Users)/", text), name
        assert "_name_or_path" not in text, name


def test_tokenizer_round_trips_source(tokenizer: Any) -> None:
    """Decoding gives back exactly what was encoded, for code and for any other text."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = [(stdlib / name).read_text(encoding="utf-8") for name in ("bisect.py", "textwrap.py")]
    texts += [
        "a\tb \r\n\r\n  c",
        "x = '\u00e4\u00f6\u20ac \u65e5\u672c\u8a9e \U0001f600'\n\n\n",
        " ,  . ! ' n't ",
        "",
    ]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert all(0 < token_id < tokenizer.vocab_size for token_id in ids)


def test_tokenizer_special_tokens(tokenizer: Any) -> None:
    """One token both begins and ends a text, and encoding does not add it."""
    config = read_json("config.json")
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer("<|endoftext|>").input_ids == [tokenizer.eos_token_id]
    assert tokenizer.vocab_size == config["vocab_size"]


def test_chat_template_joins_messages(tokenizer: Any) -> None:
    """A chat becomes the texts of its messages, one after the other."""
    messages = [
        {"role": "system", "content": "import os"},
        {"role": "user", "content": "def main("},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "import os\ndef main("


def test_completes_method_signature(model: Any, tokenizer: Any) -> None:
    """`def __init__(self, ` goes on with more parameters and then a method body."""
    continuation = complete(model, tokenizer, "def __init__(self, ")
    signature = continuation.split("\n")[0]
    assert "):" in signature
    assert "self." in continuation
    ast.parse(f"def __init__(self, {signature}\n    pass\n")


@pytest.mark.parametrize(
    ("prompt", "pattern"),
    [
        ("import os\nimport ", r"[a-z_.]+\n"),
        ("for i in range(", r"[\w., ()+*\[\]-]+\):"),
        ("class Reader:\n    def ", r"_?_?[a-z]\w*\(self[,)]"),
        ("import sys\n\nif __name__ == ", r"['\"]__main__['\"]:"),
    ],
)
def test_completes_plausible_python(model: Any, tokenizer: Any, prompt: str, pattern: str) -> None:
    """Common beginnings of statements get an ending that fits."""
    assert re.match(pattern, complete(model, tokenizer, prompt, new_tokens=24))


def test_generation_is_repeatable(model: Any, tokenizer: Any) -> None:
    """Greedy decoding gives the same text each time."""
    prompt = "def main():\n    "
    assert complete(model, tokenizer, prompt) == complete(model, tokenizer, prompt)
