"""The compiled programs of one model: a step is ``forward`` and then ``sample``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding

from dovetail.core.contracts.attention import AttentionNeed
from dovetail.core.contracts.model import Model, StepInputs
from dovetail.core.contracts.ops import OpTable
from dovetail_tpu.choice import Controls, Rules, Scores, choose, score, shaped, unmasked
from dovetail_tpu.loading import AXIS, partition
from dovetail_tpu.ops import references
from dovetail_tpu.transfers import Meter, Packed, unpack

__all__ = ["Programs"]

_ALL = partition(None)


class Programs:
    """Functions of arrays over all devices of a mesh; each is compiled once per shape.

    Args:
        model: The definition.
        weights: As loaded, on the devices.
        backend: Attends.
        need: Of one device.
        mesh: Its one axis is ``loading.AXIS``.
        meter: Counts them.
    """

    def __init__(
        self,
        model: Model,
        weights: dict[str, Any],
        backend: Any,
        need: AttentionNeed,
        mesh: Mesh,
        meter: Meter,
    ) -> None:
        self._model, self._backend, self._need = model, backend, need
        self._mesh, self._meter = mesh, meter
        self._ops = _bind(backend, need, mesh.size)
        heads = partition(backend.heads_axis)
        weight = jax.tree.map(lambda array: array.sharding.spec, weights)

        def of_model(name: str, function: Callable[..., Any], *specs: Any, **rest: Any) -> Any:
            return partial(self._program(name, function, (weight, *specs), **rest), weights)

        step = (heads, _ALL, _ALL)
        self.forward = of_model("forward", self._forward, *step, results=step, donate=(1,))
        self.sample = of_model("sample", self._sample, _ALL, _ALL, _ALL, _ALL, donate=(1, 2))
        self.score = cache(
            lambda k: of_model(f"score {k}", partial(self._score, k), _ALL, _ALL, _ALL)
        )
        self.take = self._program("take", lambda hidden, index: hidden[index])
        self.copy = self._program("copy", backend.copy_blocks, (heads, _ALL), heads, donate=(0,))
        self.set_row = self._program("set row", _set_row, donate=(0,))

    def _program(
        self,
        name: str,
        function: Callable[..., Any],
        specs: Any = _ALL,
        results: Any = _ALL,
        donate: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        """Compiled for each shape of its arguments, which lie on the devices as ``specs`` say."""
        # Interpreted kernels do not say along which axes their results vary: nothing is checked.
        mapped = jax.shard_map(
            function, mesh=self._mesh, in_specs=specs, out_specs=results, check_vma=False
        )
        return self._meter.counted(name, jax.jit(mapped, donate_argnums=donate))

    def allocate(self, num_blocks: int) -> list[Array]:
        """The caches of all layers, each device with its heads."""
        backend, need = self._backend, self._need
        make = self._program(
            "allocate",
            lambda: [backend.allocate(spec, need, num_blocks) for spec in need.specs],
            results=partition(backend.heads_axis),
        )
        caches: list[Array] = jax.block_until_ready(make())  # type: ignore[no-untyped-call]
        return caches

    def place(self, tree: Any) -> Any:
        """Arrays of the host, whole on every device."""
        return jax.device_put(tree, NamedSharding(self._mesh, _ALL))

    def _forward(
        self, weights: Any, caches: list[Array], last: Array, packed: Packed
    ) -> tuple[list[Array], Array, Array]:
        """The caches, and hidden states of the T tokens and of R of them.

        ``packed`` holds token ids (T,); rows (T,) whose last token stands there in their place,
        where it is not -1; positions (T,); which tokens R are; and the backend's plan.
        """
        token_ids, carried, positions, index, plan = unpack(packed)
        token_ids = jnp.where(carried < 0, token_ids, last[jnp.maximum(carried, 0)])
        inputs = StepInputs(token_ids_T=token_ids, positions_T=positions, plan=plan)
        hidden, caches = self._model.forward(self._ops, weights, inputs, caches)
        return caches, hidden, hidden[index]

    def _sample(
        self, weights: Any, last: Array, rules: Rules | None, hidden_ND: Array, packed: Packed
    ) -> tuple[Array, Array, Array, Rules | None]:
        """Tokens, which are finite, every row's last token, and what it has said.

        ``packed`` holds the rows (N,), where numbers beyond the last belong to nobody; the way to
        choose; ``Controls``; and, unless rules are None, token masks (N, ceil(V / 32)).
        """
        rows, way, controls, bits = unpack(packed)
        controls, x = Controls(*controls), self._logits(weights, hidden_ND)
        if rules is not None:
            x = shaped(unmasked(x, bits), rules, rows, controls)
        peak = jnp.max(x, -1, keepdims=True)
        finite = jnp.isfinite(peak[:, 0])
        tokens = jnp.where(finite, choose(x, peak, way, controls), 0)
        if rules is not None:
            rules = rules._replace(counts=rules.counts.at[rows, tokens].add(1, mode="drop"))
        return tokens, finite, last.at[rows].set(tokens, mode="drop"), rules

    def _score(
        self, k: int, weights: Any, hidden_ND: Array, chosen_N: Array, heat_N: Array
    ) -> Scores:
        return score(self._logits(weights, hidden_ND), chosen_N, heat_N, k)

    def _logits(self, weights: Any, hidden_ND: Array) -> Array:
        return jnp.asarray(self._model.logits(self._ops, weights, hidden_ND), jnp.float32)


def _bind(backend: Any, need: AttentionNeed, size: int) -> Any:
    """The op table on one of ``size`` devices: attention over its heads, and the sum over all."""
    ops = OpTable(references()).bind()
    shares = {spec.layer: spec for spec in need.specs}
    ops.attention = lambda *rest: backend.attend(*rest[:-1], shares[rest[-1].layer])
    if size > 1:
        ops.all_reduce = lambda x: lax.psum(x, AXIS)  # type: ignore[no-untyped-call]
    return ops


def _set_row(rules: Rules, row: Array, new: Rules) -> Rules:
    return Rules(*(table.at[row].set(value) for table, value in zip(rules, new, strict=True)))
