"""Deterministic mode: a row's numbers do not depend on what else is in the step, bit for bit.

A matrix product sums in an order that depends on the kernel, and the kernel is chosen by the number
of rows. So a layer runs at a few numbers of rows only, those at which it was seen to give each row
the same bits wherever it stands; steps are padded to them and cut into them. The order of a sum is
a matter of shapes, dtype and threads, never of the numbers, so that one look per shape at load is
enough.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dovetail.core.buckets import Buckets
from dovetail.core.contracts.attention import AttentionBackend
from dovetail.core.contracts.ops import OpTable
from dovetail.core.contracts.platform import Memory
from dovetail.core.contracts.runner import RunnerConfig
from dovetail.platforms.torch.ops import references
from dovetail.platforms.torch.platform import BoundLinear, TorchPlatform
from dovetail.platforms.torch.steady import steady

__all__ = ["InvariantLinear", "InvariantPlatform", "steady_sizes"]

_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of rows that are tried; a longer step is cut into pieces of the largest."""
_PATTERN = 256
"""Output rows of a weight to try with; they are repeated to the layer's number."""


class InvariantLinear:
    """A layer that gives a row the same bits in every step.

    Args:
        layer: (T, in) to (T, out).
        sizes: The numbers of rows at which it may run, ascending, as ``steady_sizes`` finds them.
    """

    def __init__(self, layer: BoundLinear, sizes: tuple[int, ...]) -> None:
        self._layer = layer
        self._sizes = sizes

    def __call__(self, x_TC: Tensor) -> Tensor:
        """(T, in) to (T, out)."""
        pieces = torch.split(x_TC.contiguous(), self._sizes[-1])
        if len(pieces) == 1:
            return self._run(pieces[0])
        return torch.cat([self._run(piece) for piece in pieces])

    def _run(self, x_TC: Tensor) -> Tensor:
        """At most the largest number of rows."""
        count = len(x_TC)
        size = next(size for size in self._sizes if size >= count)
        if size == count:
            return self._layer(x_TC)
        return self._layer(functional.pad(x_TC, (0, 0, 0, size - count)))[:count]


@torch.inference_mode()
def steady_sizes(layer: BoundLinear, x_NC: Tensor) -> tuple[int, ...]:
    """Numbers of rows, ascending, at which the layer gives each row of x the same bits.

    Args:
        layer: (T, in) to (T, out).
        x_NC: Inputs, as many as the largest number tried, such that another order of summation
            shows in the result.
    """
    for largest in reversed(_SIZES):
        whole = layer(x_NC[:largest])
        turned = layer(x_NC[:largest].roll(1, 0))
        if torch.equal(whole.roll(1, 0), turned):
            break
    return tuple(
        size for size in _SIZES if size <= largest and torch.equal(layer(x_NC[:size]), whole[:size])
    )


class _Binds(Protocol):
    def __call__(self, weight: Tensor, bias: Tensor | None, /) -> BoundLinear: ...


def _try_out(bind: _Binds, weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """The steady sizes of layers like this one, found with a weight made for it.

    The second half of the products takes away what the first half gave, in another order: what
    is left are the errors of rounding, which show the order of summation even in 16 bits.
    """
    out, width = weight.shape
    random = torch.Generator().manual_seed(0)
    half = width // 2
    places = torch.randperm(width, generator=random)
    w = torch.randn(min(out, _PATTERN), width, generator=random)
    x = torch.randn(_SIZES[-1], width, generator=random)
    w[:, places[half : 2 * half]] = w[:, places[:half]]
    x[:, places[half : 2 * half]] = -x[:, places[:half]]
    w = w.to(weight).repeat(-(-out // len(w)), 1)[:out]
    layer = bind(w, None if bias is None else torch.zeros_like(bias))
    return steady_sizes(layer, x.to(weight))


class InvariantPlatform(TorchPlatform):
    """A platform whose layers and ops are made invariant. Its own ops are left out.

    Args:
        inner: The platform; its linear layers are used at the sizes that are found steady.
    """

    def __init__(self, inner: TorchPlatform) -> None:
        self._inner = inner
        self._sizes: dict[tuple[torch.Size, torch.dtype, bool], tuple[int, ...]] = {}
        self.name = inner.name
        self.device = inner.device
        self.capabilities = inner.capabilities

    @property
    def sampling_device(self) -> torch.device:
        """That of the platform."""
        return self._inner.sampling_device

    def buckets(self, config: RunnerConfig) -> Buckets:
        """Those of the platform."""
        return self._inner.buckets(config)

    def device_names(self) -> list[str]:
        """Those of the platform."""
        return self._inner.device_names()

    def memory(self, device: int = 0) -> Memory:
        """That of the platform."""
        return self._inner.memory(device)

    def synchronize(self) -> None:
        """As the platform does."""
        self._inner.synchronize()

    def attention_backends(self) -> list[AttentionBackend]:
        """Those of the platform: each says itself whether it is invariant."""
        return self._inner.attention_backends()

    def bind_linear(self, weight: Tensor, bias: Tensor | None) -> BoundLinear:
        """The platform's layer, at steady sizes only."""
        key = (weight.shape, weight.dtype, bias is None)
        if key not in self._sizes:
            self._sizes[key] = _try_out(self._inner.bind_linear, weight, bias)
        return InvariantLinear(self._inner.bind_linear(weight, bias), self._sizes[key])

    def override_ops(self, table: OpTable) -> None:
        """The activations. The other references work number by number or row by row."""
        plain = references()
        origin = "deterministic"
        for name in ("gelu", "gelu_tanh", "silu"):
            table.override(name, _Steady(plain[name]), origin=origin)
        table.override("silu_and_mul", _SteadyGate(plain["silu"]), origin=origin)
        table.override("gelu_tanh_and_mul", _SteadyGate(plain["gelu_tanh"]), origin=origin)
        table.override("soft_cap", _soft_cap, origin=origin)


class _Activation(Protocol):
    def __call__(self, x: Tensor, /) -> Tensor: ...


class _Steady:
    """An activation, steadily."""

    def __init__(self, function: _Activation) -> None:
        self._function = function

    def __call__(self, x: Tensor) -> Tensor:
        return steady(self._function, x)


class _SteadyGate(_Steady):
    """The activation of the first half of the last axis times the second half."""

    def __call__(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return steady(self._function, gate) * up


def _soft_cap(x: Tensor, cap: float) -> Tensor:
    return cap * steady(torch.tanh, x / cap)
