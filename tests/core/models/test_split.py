"""Shares of parameters: together they are the layer, and the sums come out."""

from __future__ import annotations

import numpy as np
import pytest

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Constant, Linear, Tensor
from dovetail.core.errors import UnsupportedError
from dovetail.core.models.split import (
    check_split,
    share_of_attention,
    share_of_leaf,
    share_of_parts,
    split_axis,
)
from dovetail.core.models.weights import Parts

RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def layer(split: str | None, sources: int, rows: tuple[int, ...] = (8, 4, 4)) -> Linear:
    return Linear(
        sources=tuple(f"w{i}" for i in range(sources)),
        bias_sources=tuple(f"b{i}" for i in range(sources)),
        out_features=rows,
        in_features=12,
        split=split,  # type: ignore[arg-type]
    )


def parts_of(linear: Linear) -> Parts:
    rows = linear.out_features if len(linear.sources) > 1 else (sum(linear.out_features),)
    return Parts(
        weights=tuple(random(n, linear.in_features) for n in rows),
        biases=tuple(random(n) for n in rows),
    )


@pytest.mark.parametrize("sources", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_outputs_are_cut_within_each_entry(sources: int, size: int) -> None:
    linear = layer("out", sources)
    parts = parts_of(linear)
    whole, bias = np.concatenate(parts.weights), np.concatenate(parts.biases)
    x = random(3, 12)
    want = np.split(x @ whole.T + bias, [8, 12], axis=1)
    shares = [share_of_parts(linear, parts, rank, size) for rank in range(size)]
    results = [x @ np.concatenate(s.weights).T + np.concatenate(s.biases) for s in shares]
    ends = [8 // size, 12 // size]
    entries = zip(*(np.split(result, ends, axis=1) for result in results), strict=True)
    for got, expected in zip(entries, want, strict=True):
        np.testing.assert_allclose(np.concatenate(got, axis=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_inputs_are_cut_and_the_bias_is_added_once(size: int) -> None:
    linear = layer("in", 1, (16,))
    parts = parts_of(linear)
    x = random(3, 12)
    total = np.zeros((3, 16), np.float32)
    for rank in range(size):
        share = share_of_parts(linear, parts, rank, size)
        total += x[:, rank * 12 // size : (rank + 1) * 12 // size] @ share.weights[0].T
        total += share.biases[0]
    np.testing.assert_allclose(total, x @ parts.weights[0].T + parts.biases[0], atol=1e-5)


def test_what_is_not_split_is_whole_everywhere() -> None:
    parts = Parts(weights=(random(6, 4),))
    for leaf in (Tensor(source="t", shape=(6, 4)), Constant(make=lambda: random(6, 4))):
        assert split_axis(leaf) is None
        assert share_of_parts(leaf, parts, 1, 2) is parts


def test_shares_are_views() -> None:
    table = random(6, 4)
    leaf = Tensor(source="t", shape=(6, 4), split=1)
    share = share_of_parts(leaf, Parts(weights=(table,)), 1, 2).weights[0]
    assert split_axis(leaf) == 1
    assert np.shares_memory(share, table)
    np.testing.assert_array_equal(share, table[:, 2:])


def test_heads_are_shared() -> None:
    slopes = (1.0, 2.0, 3.0, 4.0)
    spec = AttentionSpec(
        layer=0, num_heads=4, num_kv_heads=2, head_size=8, scale=1.0, alibi_slopes=slopes
    )
    share = share_of_attention(spec, 1, 2)
    assert (share.num_heads, share.num_kv_heads, share.alibi_slopes) == (2, 1, (3.0, 4.0))


def test_what_does_not_divide_is_named_with_what_does() -> None:
    spec = AttentionSpec(layer=0, num_heads=8, num_kv_heads=2, head_size=8, scale=1.0)
    tree = {"a": layer("out", 1, (64,)), "b": layer("in", 1, (64,))}
    check_split(tree, [spec], 2)
    with pytest.raises(UnsupportedError, match=r"2 key and value heads.*allowed.*: 1, 2\."):
        check_split(tree, [spec], 4)
    with pytest.raises(UnsupportedError, match="12 input columns"):
        check_split({"b": tree["b"]}, [], 5)


def test_declarations_have_the_shapes_of_the_shares() -> None:
    for linear in (layer("out", 3), layer("in", 1, (16,)), layer(None, 1, (16,))):
        share = share_of_parts(linear, parts_of(linear), 1, 2)
        declared = share_of_leaf(linear, 2)
        assert isinstance(declared, Linear)
        rows = sum(len(weight) for weight in share.weights)
        assert (rows, share.weights[0].shape[1]) == (
            sum(declared.out_features),
            declared.in_features,
        )
    declared = share_of_leaf(Tensor(source="t", shape=(6, 4), split=1), 2)
    assert isinstance(declared, Tensor) and declared.shape == (6, 2)
