"""The models that checks share: written once, and asked once what their answers are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dovetail.core.conformance.checkpoints import (
    FAMILIES,
    VOCAB_SIZE,
    make_model,
    write_checkpoint,
    write_file,
)
from dovetail.core.conformance.oracle import Oracle, Told, Wish
from dovetail.core.contracts.model import Model
from dovetail.core.models.shard import Shard
from dovetail.core.request import SamplingParams

__all__ = ["GREEDY", "NUM_TOKENS", "PROMPTS", "Shelf", "prompt_of"]

NUM_TOKENS = 64
"""Tokens of each greedy answer."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


def prompt_of(length: int, random: np.random.Generator) -> tuple[int, ...]:
    """Random tokens, none of them special."""
    return tuple(random.integers(3, VOCAB_SIZE, length).tolist())


_RANDOM = np.random.default_rng(7)
PROMPTS: Sequence[tuple[int, ...]] = [prompt_of(n, _RANDOM) for n in (3, 17, 40, 70, 9, 33)]
"""Of several lengths: the longest comes in several pieces, and more than run at once."""


class Shelf:
    """A temporary folder of checkpoints, and the oracle of each. Belongs to whoever closes it."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="dovetail-conformance-")
        self._oracles: dict[tuple[str, str], Oracle] = {}
        self._greedy: dict[str, list[Told]] = {}

    @cached_property
    def folder(self) -> Path:
        """For whatever a check wants to write."""
        return Path(self._folder.name)

    def checkpoint(self, family: str) -> Path:
        """The folder of the family's model."""
        path = self.folder / family
        return path if path.exists() else write_checkpoint(family, path)

    def with_bad_token(self) -> tuple[Path, int]:
        """The Llama model with a token whose embedding is no number, and that token.

        No prompt has it, nor any of the oracle's answers.
        """
        said = {token for told in self.greedy("llama") for token in told.token_ids}
        bad = max(set(range(VOCAB_SIZE)) - said.union(*PROMPTS))
        path = self.folder / "llama-with-bad-token"
        if not path.exists():
            file = write_checkpoint("llama", path) / "model.safetensors"
            shard = Shard(file)
            tensors = {name: shard.tensor(name).copy() for name in shard.entries}
            tensors["model.embed_tokens.weight"][bad] = np.nan
            write_file(file, tensors)
        return path, bad

    def model(self, family: str) -> Model:
        """The definition of the family's model."""
        return make_model(FAMILIES[family])

    def oracle(self, family: str, weight_dtype: str = "float32") -> Oracle:
        """The family's oracle, its weights rounded to a dtype first."""
        key = (family, weight_dtype)
        if key not in self._oracles:
            folder, model = self.checkpoint(family), self.model(family)
            self._oracles[key] = Oracle.open(folder, model, weight_dtype=weight_dtype)
        return self._oracles[key]

    def greedy(self, family: str) -> list[Told]:
        """What the oracle answers to ``PROMPTS``."""
        if family not in self._greedy:
            wishes = [Wish(prompt=prompt, params=GREEDY) for prompt in PROMPTS]
            self._greedy[family] = self.oracle(family).tell(wishes)
        return self._greedy[family]

    def close(self) -> None:
        """Delete the folder."""
        self._folder.cleanup()
