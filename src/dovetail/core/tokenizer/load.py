"""Chooses how to read a model folder's tokenizer."""

from __future__ import annotations

import logging
from os import PathLike
from pathlib import Path

from dovetail.core.errors import CheckpointError, ConfigError
from dovetail.core.tokenizer.base import Tokenizer
from dovetail.core.tokenizer.files import TOKENIZER_FILES, TokenizerFiles

__all__ = ["TOKENIZER_MODES", "load_tokenizer"]

TOKENIZER_MODES = ("auto", "slow")
"""``auto`` reads ``tokenizer.json`` itself where it can; ``slow`` always asks transformers."""

_LOG = logging.getLogger(__name__)


def load_tokenizer(
    path: str | PathLike[str], *, mode: str = "auto", trust_remote_code: bool = False
) -> Tokenizer:
    """Read the tokenizer of a model folder.

    Args:
        path: The folder.
        mode: One of ``TOKENIZER_MODES``.
        trust_remote_code: Run Python code that the folder brings.

    Raises:
        CheckpointError: There is no tokenizer, or it cannot be read.
        ConfigError: There is no such mode.
    """
    if mode not in TOKENIZER_MODES:
        raise ConfigError(f"tokenizer_mode must be auto or slow, not {mode!r}.")
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such model folder.")
    files = TokenizerFiles.read(folder)
    if not files.has_code and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder}: no tokenizer found. Looked for {', '.join(TOKENIZER_FILES)}. Copy the"
            " tokenizer's files into the folder, name a folder that has them with --tokenizer, or"
            " set skip_tokenizer_init to work with token ids alone."
        )
    if mode == "auto" and files.tokenizer_json.exists():
        fast = _load_fast(files)
        if fast is not None:
            return fast
    from dovetail.core.tokenizer.slow import SlowTokenizer

    return SlowTokenizer(files, trust_remote_code=trust_remote_code)


def _load_fast(files: TokenizerFiles) -> Tokenizer | None:
    from dovetail.core.tokenizer.fast import FastTokenizer
    from dovetail.core.tokenizer.layouts import UnknownLayoutError

    try:
        return FastTokenizer(files)
    except UnknownLayoutError as reason:
        _LOG.info("%s: reading the tokenizer with transformers: %s", files.folder, reason)
        return None
