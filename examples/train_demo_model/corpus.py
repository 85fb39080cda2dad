"""Training text of the demonstration model: source files, tokenizer and batches."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"

# The tokenizer trainer puts special tokens first in the vocabulary.
END_OF_TEXT_ID = 0

# `encodings` and `pydoc_data` hold character tables and one long string literal of
# documentation: a large share of the bytes and little of the code.
EXCLUDED_DIRS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)

# Generated when Python is built or installed; they record the paths of that machine.
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")

# One file in this many is held out of training.
HELD_OUT_EVERY = 25

# A run of spaces (indentation) is one word and a line break another, so that a prompt that
# ends after either of them is split the way the training text was.
WORD_PATTERN = r" {2,}| ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|\n+|\s"

# Average distance in characters between the cuts that `cut_text` makes, and the share of
# them that come right after a space between two words.
CUT_DISTANCE = 100
CUT_AFTER_SPACE = 0.75
_SINGLE_SPACE = re.compile(r"(?<=\S) (?=\S)")


class SourceFile(NamedTuple):
    """One file of the standard library: its path below the library's root, and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """The source files, divided into those to train on and those to evaluate on."""

    train: list[SourceFile]
    held_out: list[SourceFile]

    def digest(self) -> str:
        """SHA-256 over the paths and texts of all files; equal digests mean equal data."""
        sha = hashlib.sha256()
        for file in sorted(self.train + self.held_out):
            sha.update(f"{file.path}\0{file.text}\0".encode())
        return sha.hexdigest()


def count_bytes(files: list[SourceFile]) -> int:
    """Number of UTF-8 bytes in the texts of `files`."""
    return sum(len(file.text.encode()) for file in files)


def collect_corpus(root: Path | None = None) -> Corpus:
    """Read the standard library's source files in sorted order.

    Which files are held out depends on their paths alone, so that the division stays the
    same from one version of the library to the next.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    train: list[SourceFile] = []
    held_out: list[SourceFile] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_DIRS.intersection(relative.parts):
            continue
        if any(part.startswith(EXCLUDED_PREFIXES) for part in relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        name = relative.as_posix()
        target = held_out if zlib.crc32(name.encode()) % HELD_OUT_EVERY == 0 else train
        target.append(SourceFile(name, text))
    return Corpus(train, held_out)


def train_tokenizer(files: list[SourceFile], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; any text survives encoding and decoding unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.text for file in files), trainer)
    return tokenizer


def cut_text(text: str, rng: random.Random) -> list[str]:
    """Cut `text` at random places; each piece is then encoded for itself.

    In unbroken text a space is part of the word that follows it, so a prompt such as
    `import ` would end in a token the model has hardly seen. The cuts show the model text
    that continues from every place where a prompt may end.
    """
    positions = {0, len(text)}
    for _ in range(len(text) // CUT_DISTANCE):
        position = rng.randrange(1, len(text))
        if rng.random() < CUT_AFTER_SPACE:
            space = _SINGLE_SPACE.search(text, position)
            position = space.end() if space else position
        positions.add(position)
    ordered = sorted(positions)
    return [text[start:end] for start, end in itertools.pairwise(ordered)]


def encode_epoch(tokenizer: Tokenizer, files: list[SourceFile], rng: random.Random) -> torch.Tensor:
    """Encode all files once, in random order and freshly cut, as one stream of token ids."""
    order = list(files)
    rng.shuffle(order)
    pieces: list[str] = []
    for file in order:
        pieces += cut_text(file.text, rng)
        pieces.append(END_OF_TEXT)
    encodings = tokenizer.encode_batch_fast(pieces)
    ids = np.concatenate([np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings])
    return torch.from_numpy(ids)


def training_batches(
    tokenizer: Tokenizer, files: list[SourceFile], length: int, rows: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield batches of shape `[rows, length + 1]` without end.

    A row carries one token more than `length`: its first `length` tokens are the input and
    its last `length` tokens are the targets.
    """
    rng = random.Random(seed)
    while True:
        stream = encode_epoch(tokenizer, files, rng)
        starts = list(range(rng.randrange(length), len(stream) - length, length))
        rng.shuffle(starts)
        if len(starts) < rows:
            raise ValueError(f"the corpus is too small for {rows} rows of {length} tokens")
        for first in range(0, len(starts) - rows + 1, rows):
            chosen = starts[first : first + rows]
            yield torch.stack([stream[start : start + length + 1] for start in chosen])
