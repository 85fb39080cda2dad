"""The least time that a device needs for steps of a model: the roofline (Williams et al., 2009).

A step reads every weight once and the keys and values of all positions that its rows attend to,
and it multiplies. The slower of the two, at the rates that the device was measured to have, is the
bound: ``max(bytes / bytes per second, operations / operations per second)``.

What counts as read: the parameters of linear layers, output layer included, as they are stored, and
of norms. Embedding and position tables do not, for a step looks up a few of their rows. Nor do
activations, logits and what sampling does with them: a real step takes longer. The rate of products
is that of the activations' dtype; layers that multiply in a smaller one may beat it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Constant, Linear, Model, Tensor
from dovetail.core.contracts.platform import Rates
from dovetail.core.contracts.runner import RunnerConfig, RunnerPlan
from dovetail.core.errors import UnsupportedError
from dovetail.core.models.load import define, parameter_bytes
from dovetail.core.models.split import share_of_leaf
from dovetail.core.models.weights import Leaf, leaves
from dovetail.core.plugins.quant import make_scheme
from dovetail.core.types import ITEM_SIZE, IntArray

__all__ = [
    "ATTENTION",
    "NORMS",
    "LayerCost",
    "Roofline",
    "Span",
    "StepCost",
    "Work",
    "layer_name",
    "step_cost",
]

ATTENTION, NORMS = "attention", "norms"
"""What there is in a step beside linear layers, which have names of their own."""

_Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Layers that look back equally far."""

    window: int | None
    """Positions that a token attends to at most, its own included; None: all."""
    kv_bytes: float
    """Keys and values of one position, in all these layers."""
    flops: int
    """Of a query with one key and value, in all these layers."""

    def seen(self, contexts: _Lengths) -> _Lengths:
        """Positions that a token at the end of each context attends to."""
        return contexts if self.window is None else np.minimum(contexts, self.window)

    def read(self, query: int, context: int) -> int:
        """Positions that any of the last ``query`` tokens of a context attends to."""
        return context if self.window is None else min(context, self.window + query - 1)

    def pairs(self, length: int) -> int:
        """Pairs of a query and a key that it attends to, in a prompt of that length."""
        full = min(length, self.window or length)
        return full * (full + 1) // 2 + (length - full) * full


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Linear layers of one name, or all norms."""

    name: str
    weight_bytes: int
    """Of all of them, as they are stored."""
    flops: int
    """Of one token in all of them."""
    is_head: bool = False
    """Computed for tokens that get a successor only."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked of the device."""

    num_bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(num_bytes=self.num_bytes + other.num_bytes, flops=self.flops + other.flops)

    def seconds(self, rates: Rates) -> float:
        """The least time that it takes."""
        by_memory = self.num_bytes / rates.read_bytes_per_second
        return max(by_memory, self.flops / rates.matrix_flops_per_second)


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What steps of a model ask of one device."""

    weight_bytes: int
    """That every step reads."""
    layer_flops: int
    """Of one token in all linear layers but the output layer."""
    head_flops: int
    """Of one token in the output layer."""
    spans: tuple[Span, ...]
    layers: tuple[LayerCost, ...] = ()
    """The weights and operations above, by name."""

    def work(
        self, query_lens: IntArray, context_lens: IntArray, num_places: int
    ) -> Mapping[str, Work]:
        """What one step asks, by the names of ``layers`` and ``ATTENTION``.

        Args:
            query_lens: (R,) tokens of each row in this step.
            context_lens: (R,) positions of each row, those tokens included.
            num_places: Tokens that get a successor.
        """
        num_tokens = int(query_lens.sum())
        found = {}
        for layer in self.layers:
            count = num_places if layer.is_head else num_tokens
            num_bytes = layer.weight_bytes if count else 0
            found[layer.name] = Work(num_bytes=num_bytes, flops=layer.flops * count)
        rows = list(zip(query_lens.tolist(), context_lens.tolist(), strict=True))
        attention = Work()
        for span in self.spans:
            read = sum(span.read(query, context) for query, context in rows)
            pairs = sum(
                span.pairs(context) - span.pairs(context - query) for query, context in rows
            )
            attention += Work(num_bytes=read * span.kv_bytes, flops=pairs * span.flops)
        return {**found, ATTENTION: attention}


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """A model's steps on a device of known rates. All times are seconds."""

    cost: StepCost
    rates: Rates

    def decode(self, contexts: Iterable[int]) -> float:
        """A step that computes one token for each row.

        Args:
            contexts: Positions of each row with the new token's.
        """
        lengths = np.fromiter(contexts, np.int64)
        cost, num_rows = self.cost, len(lengths)
        num_bytes = float(cost.weight_bytes)
        flops = num_rows * (cost.layer_flops + cost.head_flops)
        for span in cost.spans:
            seen = int(span.seen(lengths).sum())
            num_bytes += seen * span.kv_bytes
            flops += seen * span.flops
        return self._slower(num_bytes, flops)

    def prefill(self, prompts: Iterable[int]) -> float:
        """All tokens of prompts, in as few steps as you like."""
        lengths = list(prompts)
        cost = self.cost
        flops = sum(lengths) * cost.layer_flops + len(lengths) * cost.head_flops
        for span in cost.spans:
            flops += sum(map(span.pairs, lengths)) * span.flops
        return self._slower(cost.weight_bytes, flops)

    def workload(self, lengths: Sequence[tuple[int, int]]) -> float:
        """Requests that all start at once: their prompts, and then every step that decodes.

        The first token of an answer comes from the prompt. However little memory there is, all
        requests count as running at once, so this is the bound of the device and not of the
        settings. An engine that hides prompts behind steps that decode may come below it.

        Args:
            lengths: Of prompt and answer, in tokens.
        """
        inputs, outputs = np.array(lengths, np.int64).reshape(-1, 2).T
        seconds = self.prefill(inputs.tolist())
        for step in range(1, int(outputs.max(initial=0))):
            seconds += self.decode(inputs[outputs > step] + step)
        return seconds

    def _slower(self, num_bytes: float, flops: float) -> float:
        return Work(num_bytes=num_bytes, flops=flops).seconds(self.rates)


def step_cost(config: RunnerConfig, plan: RunnerPlan) -> StepCost:
    """What a native model's steps cost, from its definition and the plan for it.

    Raises:
        UnsupportedError: Steps check drafts, the model is not a native one, or the plan counts no
            weights: nothing simple can be said.
    """
    if config.max_drafts:
        raise UnsupportedError("steps that check drafts compute more than one token per row")
    model, size = define(config), config.tensor_parallel_size
    held = [(leaf, share_of_leaf(leaf, size)) for _, leaf in leaves(model.weights())]
    tables = sum(_table_bytes(share, ITEM_SIZE[config.dtype]) for _, share in held)
    if plan.weight_bytes <= tables:
        raise UnsupportedError(f"its plan counts {plan.weight_bytes} bytes of weights")
    layers = _layers(model, config)
    return StepCost(
        weight_bytes=plan.weight_bytes - tables,
        layer_flops=sum(layer.flops for layer in layers if not layer.is_head),
        head_flops=sum(layer.flops for layer in layers if layer.is_head),
        layers=layers,
        spans=_spans(model.attention_specs(), plan.bytes_per_block / config.block_size, size),
    )


def layer_name(path: str) -> str:
    """Of a linear layer by its path in the tree of weights: ``qkv``, whatever its number."""
    return path.removesuffix(".layer").rpartition(".")[2]


def _layers(model: Model, config: RunnerConfig) -> tuple[LayerCost, ...]:
    """In the order of the tree."""
    quantization, size = config.quantization, config.tensor_parallel_size
    scheme = None if quantization is None else make_scheme(quantization, config.hf_config)
    num_bytes = parameter_bytes(model, config, scheme)
    found: dict[str, LayerCost] = {}
    for path, leaf in leaves(model.weights()):
        is_norm = isinstance(leaf, Tensor) and len(leaf.shape) == 1
        if not is_norm and not isinstance(leaf, Linear):
            continue
        name = NORMS if is_norm else layer_name(path)
        known = found.get(name, LayerCost(name=name, weight_bytes=0, flops=0))
        found[name] = LayerCost(
            name=name,
            weight_bytes=known.weight_bytes + num_bytes[path],
            flops=known.flops + _linear_flops(share_of_leaf(leaf, size)),
            is_head=_is_head(leaf, model),
        )
    return tuple(found.values())


def _spans(
    specs: Sequence[AttentionSpec], bytes_per_position: float, size: int
) -> tuple[Span, ...]:
    """The plan's bytes, shared out by the layers' widths."""
    widths = [spec.num_kv_heads * spec.head_size for spec in specs]
    found = []
    for window in {spec.window: None for spec in specs}:
        alike = [i for i, spec in enumerate(specs) if spec.window == window]
        share = sum(widths[i] for i in alike) / sum(widths)
        heads = sum(specs[i].num_heads * specs[i].head_size for i in alike)
        found.append(
            Span(window=window, kv_bytes=bytes_per_position * share, flops=4 * heads // size)
        )
    return tuple(found)


def _table_bytes(leaf: Leaf, item: int) -> int:
    """Of a table that is looked up, not read; 0 for anything else."""
    match leaf:
        case Tensor() if len(leaf.shape) > 1:
            return math.prod(leaf.shape) * (ITEM_SIZE["float32"] if leaf.offset else item)
        case Constant():
            return leaf.make().nbytes
    return 0


def _is_head(leaf: Leaf, model: Model) -> bool:
    return isinstance(leaf, Linear) and sum(leaf.out_features) == model.vocab_size


def _linear_flops(leaf: Leaf) -> int:
    return 2 * sum(leaf.out_features) * leaf.in_features if isinstance(leaf, Linear) else 0
