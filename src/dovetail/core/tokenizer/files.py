"""The files of a model folder that describe its tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.core.errors import CheckpointError

__all__ = ["TOKENIZER_FILES", "TokenizerFiles"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
)
"""A folder without any of these has no tokenizer, unless its configuration brings code."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What the small files say; those that are missing are empty."""

    folder: Path
    config: dict[str, Any]
    """``tokenizer_config.json``."""
    special_tokens_map: dict[str, Any]
    added_tokens: dict[str, Any]
    """``added_tokens.json``: token to id."""
    model: dict[str, Any]
    """``config.json``."""

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Read them.

        Raises:
            CheckpointError: A file is not JSON, or not an object.
        """
        return cls(
            folder=folder,
            config=_read_object(folder / "tokenizer_config.json"),
            special_tokens_map=_read_object(folder / "special_tokens_map.json"),
            added_tokens=_read_object(folder / "added_tokens.json"),
            model=_read_object(folder / "config.json"),
        )

    @property
    def tokenizer_json(self) -> Path:
        """Where the whole tokenizer is, if the folder has it in one file."""
        return self.folder / "tokenizer.json"

    @property
    def has_code(self) -> bool:
        """Whether the folder brings its own tokenizer class."""
        auto_map = self.config.get("auto_map")
        if isinstance(auto_map, dict):
            return "AutoTokenizer" in auto_map
        return isinstance(auto_map, list)

    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name, ``default`` for the usual one; files go before settings.

        Raises:
            CheckpointError: A template is not text.
        """
        files = {"default": self.folder / "chat_template.jinja"}
        for path in sorted((self.folder / "additional_chat_templates").glob("*.jinja")):
            files[path.stem] = path
        templates: Any = {
            name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()
        }
        if not templates:
            templates = self.config.get("chat_template")
        if not templates:
            templates = _read_object(self.folder / "chat_template.json").get("chat_template")
        return _by_name(templates, self.folder)


def _by_name(templates: Any, folder: Path) -> dict[str, str]:
    if not templates:
        return {}
    if isinstance(templates, str):
        return {"default": templates}
    if isinstance(templates, list) and all(isinstance(entry, dict) for entry in templates):
        templates = {entry.get("name"): entry.get("template") for entry in templates}
    if not isinstance(templates, dict) or not all(
        isinstance(name, str) and isinstance(text, str) for name, text in templates.items()
    ):
        raise CheckpointError(f"{folder}: the chat template is neither text nor several by name.")
    return templates


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(content).__name__}.")
    return content
