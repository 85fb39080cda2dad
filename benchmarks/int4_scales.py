"""How int4 could choose the scale of a group, by weights and by what the bundled model says.

    python -m benchmarks.int4_scales src/dovetail/core/*.py

A way is what the entry of a group that is furthest from zero becomes, and factors of the scale that
follows: of these the one with the least squared error is taken. Errors are squares over the squares
of the weights, in thousandths. The divergence is that of Kullback and Leibler between what the
model says of the next token, unquantized and quantized: the mean over the places of a text, in
thousandths. It has less noise than perplexity, which rounding sometimes happens to lower.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.perplexity import read_texts
from dovetail.core.conformance.oracle import Oracle
from dovetail.core.conformance.sampler import log_softmax
from dovetail.core.contracts.model import Linear
from dovetail.core.contracts.ops import INT4_GROUP
from dovetail.core.contracts.quant import QuantParams, QuantScheme
from dovetail.core.demo import demo_model_path
from dovetail.core.models.checkpoint import open_checkpoint
from dovetail.core.models.llama import Llama
from dovetail.quant.int4 import Int4

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Way:
    """How scales are chosen."""

    furthest: int
    """What the furthest entry becomes; of 7 its magnitude does."""
    factors: tuple[float, ...] = (1,)
    everywhere: bool = False
    """The output layer is in 4 bits too."""

    def codes(self, groups: Floats) -> tuple[Floats, Floats, Floats]:
        """Codes (N, 64), scales (N, 1) and squared errors (N, 1) of groups (N, 64)."""
        place = np.abs(groups).argmax(1)[:, None]
        peak = np.take_along_axis(groups, place, 1)
        base = (np.abs(peak) if self.furthest > 0 else peak) / np.float32(self.furthest)
        base[base == 0] = 1
        found = []
        for factor in self.factors:
            scales = base * np.float32(factor)
            codes = np.clip(np.rint(groups / scales), -8, 7)
            found.append((codes, scales, ((codes * scales - groups) ** 2).sum(1, keepdims=True)))
        best = np.argmin([errors[:, 0] for _, _, errors in found], axis=0)
        rows = np.arange(len(groups))
        codes, scales, errors = (np.stack(part)[best, rows] for part in zip(*found, strict=True))
        return codes, scales, errors


WAYS = (
    Way(7),
    Way(-8),
    Way(-8, (1, 0.9)),
    Way(-8, (1, 0.93, 0.86)),
    Way(-8, (1.05, 1, 0.95, 0.9, 0.85, 0.8)),
    Way(-8, everywhere=True),
)


class Variant(Int4):
    """``Int4`` with scales chosen in another way."""

    def __init__(self, way: Way) -> None:
        super().__init__({})
        self._way = way

    def for_layer(self, path: str, layer: Linear) -> QuantScheme:
        return self if self._way.everywhere else super().for_layer(path, layer)

    def quantize(self, weight: np.ndarray[Any, Any]) -> QuantParams:
        groups = weight.astype(np.float32).reshape(-1, INT4_GROUP)
        codes, scales, _ = self._way.codes(groups)
        whole = (codes + 8).astype(np.uint8).reshape(len(weight), -1)
        packed = whole[:, ::2] | whole[:, 1::2] << 4
        return {"codes": packed, "scales": scales.reshape(len(weight), -1)}


def layers_of(model: Path) -> Floats:
    """The weights of all layers but the output layer, in groups."""
    checkpoint = open_checkpoint(model)
    names = [name for name in checkpoint.shapes if name.endswith("proj.weight")]
    arrays = [checkpoint.tensor(name).astype(np.float32) for name in names]
    return np.concatenate([array.reshape(-1, INT4_GROUP) for array in arrays])


def opinions(texts: Sequence[Sequence[int]], scheme: QuantScheme | None) -> list[Floats]:
    """(L - 1, V) log-probabilities of the bundled model, by the conformance kit's oracle."""
    folder = demo_model_path()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Llama.from_config(config, max_model_len=max(map(len, texts)))
    oracle = Oracle.open(folder, model, scheme=scheme)
    return [log_softmax(oracle.logits_of(text[:-1])).astype(np.float32) for text in texts]


def surprise(opinion: Sequence[Floats], texts: Sequence[Sequence[int]]) -> float:
    """Negative log-probability per token."""
    pairs = zip(opinion, texts, strict=True)
    said = [known[np.arange(len(text) - 1), text[1:]] for known, text in pairs]
    return -float(np.concatenate(said).mean())


def divergence(plain: Sequence[Floats], other: Sequence[Floats]) -> float:
    """The mean over all places."""
    pairs = zip(plain, other, strict=True)
    return float(np.concatenate([(np.exp(p) * (p - q)).sum(1) for p, q in pairs]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    texts = read_texts(demo_model_path(), parser.parse_args().files, 1024)
    texts = [text for text in texts if len(text) > 1]
    random = np.random.default_rng(0)
    weights = {
        "bundled model": layers_of(demo_model_path()),
        "normal": random.standard_normal((20_000, INT4_GROUP), np.float32),
        "t, 5 degrees": random.standard_t(5, (20_000, INT4_GROUP)).astype(np.float32),
    }
    plain = opinions(texts, None)
    count = sum(map(len, texts))
    print(f"{count:,} tokens, perplexity not quantized: {np.exp(surprise(plain, texts)):.2f}")
    for way in WAYS:
        errors = [float(way.codes(g)[2].sum() / (g**2).sum()) for g in weights.values()]
        shown = ", ".join(f"{name} {1e3 * e:.2f}" for name, e in zip(weights, errors, strict=True))
        other = opinions(texts, Variant(way))
        cost = np.exp(surprise(other, texts) - surprise(plain, texts)) - 1
        far = 1e3 * divergence(plain, other)
        print(f"{way}: {shown}; divergence {far:.2f}, perplexity {cost:+.2%}", flush=True)


if __name__ == "__main__":
    main()
