"""The compiled programs of one model: a step is ``forward`` and then ``sample``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding

from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.contracts.model import Model, StepInputs
from dovetail.core.contracts.ops import OpTable
from dovetail_tpu.choice import Rules, Scores, choose, score, shaped, unmasked
from dovetail_tpu.loading import AXIS, partition
from dovetail_tpu.ops import references
from dovetail_tpu.packing import Packed, unpack

__all__ = ["Programs", "Tokens"]

_ALL = partition(None)


class Tokens(NamedTuple):
    """A step's tokens, (T,) each, and which of them have a successor chosen, (R,)."""

    token_ids: Any
    carried: Any
    """The row whose last token stands here in place of ``token_ids``; -1: none."""
    positions: Any
    index: Any


class Programs:
    """Functions of arrays over all devices of a mesh; each is compiled once per shape.

    Args:
        model: The definition.
        weights: As loaded, on the devices.
        backend: Attends.
        need: Of one device.
        mesh: Its one axis is ``loading.AXIS``.
        max_rows: Rows are numbered below this.
    """

    def __init__(
        self,
        model: Model,
        weights: dict[str, Any],
        backend: Any,
        need: AttentionNeed,
        mesh: Mesh,
        max_rows: int,
    ) -> None:
        self._model, self._backend, self._need, self._mesh = model, backend, need, mesh
        self._ops = _bind(backend, need, mesh.size)
        cache = partition(backend.heads_axis)
        weight = jax.tree.map(lambda array: array.sharding.spec, weights)
        self.forward = self._program(
            self._forward, (weight, cache, _ALL, _ALL), (_ALL, _ALL, cache), donate=(1,)
        )
        self.sample = functools.cache(
            lambda restricts: self._program(
                functools.partial(self._sample, restricts),
                (weight, *[_ALL] * 4),
                _ALL,
                donate=(1, 2),
            )
        )
        self.score = functools.cache(
            lambda k: self._program(
                functools.partial(self._score, k), (weight, _ALL, _ALL, _ALL), _ALL
            )
        )
        self.take = self._program(lambda hidden, index: hidden[index], (_ALL, _ALL), _ALL)
        self.copy = self._program(backend.copy_blocks, (cache, _ALL), cache, donate=(0,))
        row = Rules.none(model.vocab_size)
        self.no_rules = self._program(lambda: _repeated(row, max_rows), (), _ALL)
        self.set_row = self._program(_set_row, (_ALL, _ALL, _ALL), _ALL, donate=(0,))
        self._cache = cache

    def allocate(self, num_blocks: int) -> list[Array]:
        """The caches of all layers, each device with its heads."""

        def make() -> list[Array]:
            specs = self._need.specs
            return [self._backend.allocate(spec, self._need, num_blocks) for spec in specs]

        caches: list[Array] = self._program(make, (), self._cache)()
        for cache in jax.tree.leaves(caches):
            cache.block_until_ready()
        return caches

    def place(self, array: np.ndarray[Any, Any]) -> Array:
        """The array on every device."""
        placed: Array = jax.device_put(array, NamedSharding(self._mesh, _ALL))
        return placed

    def _program(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        results: Any,
        donate: Sequence[int] = (),
    ) -> Any:
        # Interpreted kernels do not say along which axes their results vary.
        mapped = jax.shard_map(
            function,
            mesh=self._mesh,
            in_specs=tuple(arguments),
            out_specs=results,
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=tuple(donate))

    def _forward(
        self, weights: Any, caches: list[Array], last: Array, packed: Packed
    ) -> tuple[Array, Array, list[Array]]:
        """Hidden states of the T tokens and of R of them, and the caches.

        ``packed`` holds ``Tokens`` and the backend's plan.
        """
        tokens, plan = unpack(packed)
        carried = last[jnp.maximum(tokens.carried, 0)]
        inputs = StepInputs(
            token_ids_T=jnp.where(tokens.carried < 0, tokens.token_ids, carried),
            positions_T=tokens.positions,
            plan=plan,
        )
        hidden, caches = self._model.forward(self._ops, weights, inputs, caches)
        return hidden, hidden[tokens.index], caches

    def _sample(
        self,
        restricts: bool,
        weights: Any,
        last: Array,
        rules: Rules | None,
        hidden_ND: Array,
        packed: Packed,
    ) -> tuple[Array, Array, Array, Rules | None]:
        """Tokens, which are finite, every row's last token, and what it has said.

        ``packed`` holds the rows, where numbers beyond the last belong to nobody; controls, or
        None if all are greedy; and token masks, or None if there are no rules either.
        """
        rows, controls, bits = unpack(packed)
        raw = self._logits(weights, hidden_ND)
        x = raw
        if rules is not None:
            mine = jax.tree.map(lambda table: jnp.take(table, rows, axis=0, mode="clip"), rules)
            x = shaped(unmasked(raw, bits), mine, controls.num_generated)
        tokens = choose(x, controls, restricts=restricts)
        finite = jnp.isfinite(jnp.max(raw, -1)) & jnp.isfinite(jnp.max(x, -1))
        tokens = jnp.where(finite, tokens, 0)
        last = last.at[rows].set(tokens, mode="drop")
        if rules is not None:
            counts = rules.counts.at[rows, tokens].add(1, mode="drop")
            rules = rules._replace(counts=counts)
        return tokens, finite, last, rules

    def _score(
        self, k: int, weights: Any, hidden_ND: Array, chosen_N: Array, heat_N: Array
    ) -> Scores:
        return score(self._logits(weights, hidden_ND), chosen_N, heat_N, k)

    def _logits(self, weights: Any, hidden_ND: Array) -> Array:
        logits: Array = self._model.logits(self._ops, weights, hidden_ND).astype(jnp.float32)
        return logits


def _bind(backend: Any, need: AttentionNeed, size: int) -> Any:
    """The op table on one of ``size`` devices: attention over its heads, and the sum over all."""
    ops = OpTable(references()).bind()
    shares = {spec.layer: spec for spec in need.specs}

    def attention(
        q_THE: Array, k_TKE: Array, v_TKE: Array, cache: Any, plan: object, spec: AttentionSpec
    ) -> tuple[Array, Any]:
        out: tuple[Array, Any] = backend.attend(
            q_THE, k_TKE, v_TKE, cache, plan, shares[spec.layer]
        )
        return out

    ops.attention = attention
    if size > 1:
        ops.all_reduce = lambda x: lax.psum(x, AXIS)  # type: ignore[no-untyped-call]
    return ops


def _repeated(row: Rules, count: int) -> Rules:
    rows: Rules = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), row)
    return rows


def _set_row(rules: Rules, row: Array, new: Rules) -> Rules:
    replaced: Rules = jax.tree.map(lambda table, value: table.at[row].set(value), rules, new)
    return replaced
