"""Levels 1 and 2 fail what they must: one part of the reference platform is broken at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from dovetail.core.conformance import collective_checks
from dovetail.core.conformance.peer import exercise, notices
from dovetail.core.conformance.shelf import Shelf
from dovetail.core.contracts.ops import OpTable
from dovetail.core.contracts.platform import Adjustment, Memory
from dovetail.core.plugins.selection import load_platform
from dovetail.platforms.torch.communicator import HostCommunicator
from dovetail.platforms.torch.integer_ops import IntegerWeight, in_8_bits
from dovetail.platforms.torch.ops import DenseLinear, references
from tests.core.conformance.subjects import Wrapped, broken, capable, look

CAPABILITIES: dict[str, dict[str, Any]] = {
    "an unknown dtype": {"dtypes": ("float32", "float8")},
    "no dtypes": {"dtypes": ()},
    "a dtype twice": {"dtypes": ("float32", "float32")},
    "an unknown KV dtype": {"kv_dtypes": ("auto", "int3")},
    "an unknown feature": {"features": frozenset({"speculaton"})},
    "features that are a set": {"features": {"speculation"}},
    "no block sizes": {"block_sizes": ()},
    "a block size of 0": {"block_sizes": (16, 0)},
    "fewer tokens than rows": {"max_num_batched_tokens": 4, "max_num_seqs": 8},
    "no family": {"family": ""},
    "a draft model for nothing": {"features": frozenset({"draft_model"})},
    "slow in the dtype that it prefers": {"slow_dtypes": frozenset({"float32"})},
    "slow in an unknown dtype": {"slow_dtypes": frozenset({"float8"})},
}


@pytest.mark.parametrize("what", CAPABILITIES)
def test_capabilities(what: str, shelf: Shelf) -> None:
    platform = broken(capabilities=capable(**CAPABILITIES[what]))
    assert look(platform, shelf, "contract.capabilities").status == "fail"


MEMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "another name": ("contract.name", {"name": "other"}),
    "no devices": ("contract.devices", {"device_names": lambda self: []}),
    "two lines": ("contract.devices", {"device_names": lambda self: ["a\nb"]}),
    "more free than there is": (
        "contract.memory",
        {"memory": lambda self, device=0: Memory(free=2, total=1)},
    ),
    "memory in floats": (
        "contract.memory",
        {"memory": lambda self, device=0: Memory(free=1.0, total=2.0)},  # type: ignore[arg-type]
    ),
    "an adjustment of nothing": (
        "contract.adjust",
        {"adjust": lambda self, s: [Adjustment(field="colour", value=1, reason="so")]},
    ),
    "an adjustment without a reason": (
        "contract.adjust",
        {"adjust": lambda self, s: [Adjustment(field="block_size", value=8, reason=" ")]},
    ),
}


@pytest.mark.parametrize("what", MEMBERS)
def test_what_a_platform_says(what: str, shelf: Shelf) -> None:
    name, members = MEMBERS[what]
    assert look(broken(**members), shelf, name).status == "fail"


OPS = references()


def _changing(x: torch.Tensor) -> torch.Tensor:
    return x.clamp_(min=0)


def _forgetful(x: Any, residual: Any, weight: Any, eps: float) -> Any:
    normed, _ = OPS["add_rms_norm"](x, residual, weight, eps)
    return normed, x


WRONG_OPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "off by a little": ("silu", lambda x: OPS["silu"](x) + 1e-3),
    "another approximation": ("gelu", lambda x: OPS["gelu_tanh"](x)),
    "another dtype": ("soft_cap", lambda x, cap: OPS["soft_cap"](x, cap).double()),
    "an input is changed": ("relu", _changing),
    "the sum is forgotten": ("add_rms_norm", _forgetful),
    "the halves are swapped": (
        "silu_and_mul",
        lambda x: OPS["silu_and_mul"](torch.cat(x.chunk(2, -1)[::-1], -1)),
    ),
    "only the last axis of two": (
        "rms_norm",
        lambda x, w, eps: OPS["rms_norm"](x.flatten(1), w, eps).view_as(x) if x.dim() < 3 else x,
    ),
    "eps is ignored": ("rms_norm", lambda x, w, eps: OPS["rms_norm"](x, w, 0.0)),
    "the bias is ignored": ("layer_norm", lambda x, w, b, eps: OPS["layer_norm"](x, w, None, eps)),
    "pairs are neighbours": (
        "rotary",
        lambda x, c, s: OPS["rotary"](x.flip(-1), c, s).flip(-1),
    ),
    "the rest of a head is dropped": (
        "rotary",
        lambda x, c, s: OPS["rotary"](x[..., : 2 * c.shape[-1]], c, s),
    ),
    "the bias of integers is ignored": (
        "int8_linear",
        lambda x, w: OPS["int8_linear"](x, w._replace(bias=None)),
    ),
    "activations are not rounded": ("int8_linear", lambda x, w: _unrounded(x, w)),
    "activations are cut off": ("int8_linear", lambda x, w: OPS["int8_linear"](_cut_off(x), w)),
    "all rows have one step": ("int4_linear", lambda x, w: OPS["int4_linear"](_one_step(x), w)),
    "NaN becomes a number": ("int8_linear", lambda x, w: OPS["int8_linear"](x.nan_to_num(), w)),
    "sums of pairs have 16 bits": ("int8_linear", lambda x, w: _saturated(x, w)),
    "NaN spreads": ("int4_linear", lambda x, w: OPS["int4_linear"](x, w) + 0 * x.sum()),
    "neighbours change places": (
        "int4_linear",
        lambda x, w: OPS["int4_linear"](x, w._replace(codes=w.codes << 4 | w.codes >> 4)),
    ),
    "NaN": ("gelu_tanh", lambda x: torch.where(x > 2, torch.nan, OPS["gelu_tanh"](x))),
}


def _unrounded(x: torch.Tensor, weight: IntegerWeight) -> torch.Tensor:
    """Integer weights, and activations as they are."""
    out = x @ (weight.codes * weight.scales[:, None]).to(x.dtype).T
    return out if weight.bias is None else out + weight.bias


def _saturated(x: torch.Tensor, weight: IntegerWeight) -> torch.Tensor:
    """Two neighbours' products with activations moved to 0..254, as some instructions add them."""
    q, steps = in_8_bits(x)
    codes = weight.codes.float()
    products = functional.pad((q + 127)[:, None] * codes, (0, x.shape[1] % 2))
    pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
    out = (pairs.sum(-1) - 127 * codes.sum(1)) * steps * weight.scales
    return out if weight.bias is None else out + weight.bias


def _one_step(x: torch.Tensor) -> torch.Tensor:
    step = (x[x.isfinite()].abs().max() / 127).clamp(min=1e-9)
    return (x / step).round() * step


def _cut_off(x: torch.Tensor) -> torch.Tensor:
    """What becomes the codes that rounding towards zero gives."""
    _, steps = in_8_bits(x)
    return (x / steps).trunc() * steps


@pytest.mark.parametrize("what", WRONG_OPS)
def test_ops(what: str, shelf: Shelf) -> None:
    name, function = WRONG_OPS[what]

    def override(self: Any, table: OpTable) -> None:
        table.override(name, function, origin="a test", tolerance={"float32": 1.0})

    platform = broken(override_ops=override)
    assert look(platform, shelf, f"ops.{name}.float32").status == "fail"
    other = "ops.embedding.float32"
    assert look(platform, shelf, other).status == "pass"


def test_a_stated_tolerance_counts_within_reason(shelf: Shelf) -> None:
    def override(tolerance: float) -> Any:
        def enter(self: Any, table: OpTable) -> None:
            table.override(
                "silu",
                lambda x: OPS["silu"](x) + 3e-5,
                origin="a test",
                tolerance={"float32": tolerance},
            )

        return broken(override_ops=enter)

    assert look(override(1e-5), shelf, "ops.silu.float32").status == "fail"
    assert look(override(4e-5), shelf, "ops.silu.float32").status == "pass"


def test_linear_layers(shelf: Shelf) -> None:
    platform = broken(bind_linear=lambda self, weight, bias: DenseLinear(weight, None))
    outcome = look(platform, shelf, "ops.linear.float32")
    assert outcome.status == "fail" and "linear" in outcome.reason


def test_no_workbench_is_unsupported(shelf: Shelf) -> None:
    platform = load_platform("null")
    assert look(platform, shelf, "ops.linear.float32").status == "unsupported"


def attending(**methods: Any) -> Any:
    """A platform whose one attention backend has these methods replaced."""
    backend = load_platform("reference").attention_backends()[0]
    return broken(attention_backends=lambda self: [Wrapped(backend, **methods)])


def _without(**fields: Any) -> Callable[..., Any]:
    def attend(own: Any, q: Any, k: Any, v: Any, cache: Any, plan: Any, spec: Any) -> Any:
        return own(q, k, v, cache, plan, replace(spec, **fields))

    return attend


def _first_row_only(own: Any, batch: Any, need: Any) -> Any:
    """Reads the blocks of the first row for all rows."""
    tables = np.repeat(batch.block_tables[:1], batch.num_rows, 0)
    plan = own(batch, need)
    wrong = own(replace(batch, block_tables=tables), need)
    return replace(plan, rows=wrong.rows)


def _one_too_many(own: Any, batch: Any, need: Any) -> Any:
    """Every row sees one position more than it has."""
    plan = own(batch, need)
    return replace(plan, rows=[(a, n, length + 1, blocks) for a, n, length, blocks in plan.rows])


def _with_leftovers(own: Any, q: Any, k: Any, v: Any, cache: Any, plan: Any, spec: Any) -> Any:
    """Multiplies by 0 what lies in a row's last block behind its last position."""
    out, cache = own(q, k, v, cache, plan, spec)
    for start, count, length, blocks in plan.rows:
        beyond = cache.gather(blocks, torch.float32)[1, :, length:]
        out[start : start + count] += 0.0 * beyond.sum()
    return out, cache


def _no_copy(own: Any, caches: Any, pairs: Any) -> Any:
    return caches


def _swapped(own: Any, caches: Any, pairs: Any) -> Any:
    return own(caches, np.ascontiguousarray(pairs[:, ::-1]))


WRONG_ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {
    "no window": ("window", {"attend": _without(window=None)}),
    "a window that is one too wide": ("narrow_window", {"attend": _without(window=4)}),
    "no soft cap": ("soft_cap", {"attend": _without(soft_cap=None)}),
    "no slopes": ("alibi", {"attend": _without(alibi_slopes=None)}),
    "another scale": ("grouped", {"attend": _without(scale=0.3)}),
    "the first row's blocks": ("grouped", {"plan": _first_row_only}),
    "a position too many": ("grouped", {"plan": _one_too_many}),
    "what is left in a block": ("grouped", {"attend": _with_leftovers}),
    "nothing is copied": ("copy_blocks", {"copy_blocks": _no_copy}),
    "copied the wrong way": ("copy_blocks", {"copy_blocks": _swapped}),
    "bytes that are not true": (
        "cache_bytes",
        {"bytes_per_block": lambda own, spec, need: own(spec, need) - 1},
    ),
}


@pytest.mark.parametrize("what", WRONG_ATTENTION)
def test_attention(what: str, shelf: Shelf) -> None:
    name, methods = WRONG_ATTENTION[what]
    outcome = look(attending(**methods), shelf, f"attention.reference.{name}.float32")
    assert outcome.status == "fail", outcome


def test_what_is_left_in_a_block_harms_an_engine(shelf: Shelf) -> None:
    for attend, status in ((_with_leftovers, "fail"), (_without(), "pass")):
        assert look(attending(attend=attend), shelf, "engine.bad_request").status == status


def test_whole_attention_passes_and_refusals_are_unsupported(shelf: Shelf) -> None:
    name = "attention.reference.window.float32"
    assert look(attending(), shelf, name).status == "pass"
    refusing = attending(refuses=lambda own, need: "it has no windows")
    outcome = look(refusing, shelf, name)
    assert (outcome.status, outcome.reason) == ("unsupported", "it has no windows")


def _over_all_rows(own: Any, q: Any, k: Any, v: Any, cache: Any, plan: Any, spec: Any) -> Any:
    out, cache = own(q, k, v, cache, plan, spec)
    return out + 1e-3 * v.mean(), cache


def test_padded_rows_that_matter(shelf: Shelf) -> None:
    name = "attention.reference.padding.float32"
    backend = load_platform("reference").attention_backends()[0]
    static = {"capabilities": capable(static_shapes=True, mixed_batches=False)}

    def platform(**methods: Any) -> Any:
        return broken(attention_backends=lambda self: [Wrapped(backend, **methods)], **static)

    assert look(platform(), shelf, name).status == "pass"
    assert look(platform(attend=_over_all_rows), shelf, name).status == "fail"


def test_coded_caches(shelf: Shelf) -> None:
    """Codes that lose more than they should are found: every other entry is dropped."""

    def attend(own: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return own(q, k, v * (torch.arange(v.shape[-1]) % 2), *rest)

    name = "attention.reference.kv_int8.float32"
    assert look(attending(), shelf, name).status == "pass"
    assert look(attending(attend=attend), shelf, name).status == "fail"


def test_pieces_that_change_bits(shelf: Shelf) -> None:
    """The readable backend, where it claims to be deterministic."""
    features = frozenset({"deterministic"})
    backend = load_platform("reference").attention_backends()[1]
    wrapped = Wrapped(backend, refuses=lambda own, need: None)
    platform = broken(
        attention_backends=lambda self: [wrapped], capabilities=capable(features=features)
    )
    assert look(platform, shelf, "attention.sdpa.deterministic.float32").status == "fail"


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("all_reduce", lambda own, x: x.clone()),
        ("all_reduce", lambda own, x: own(x.float()).double()),
        ("all_reduce", lambda own, x: x.copy_(own(x))),
        ("all_gather", lambda own, x, axis: own(x, 0)),
        ("reduce_scatter", lambda own, x, axis: own(x.flip(axis), axis)),
        ("broadcast", lambda own, x, source: own(x, 0)),
    ],
)
def test_collectives(name: str, method: Callable[..., Any], tmp_path: Any) -> None:
    right, wrong = members(tmp_path / "a"), members(tmp_path / "b", **{name: method})
    assert right == [{}, {}]
    assert any(name in found for found in wrong)


def members(address: Any, **methods: Any) -> list[dict[str, str]]:
    """What two members find, each in a thread."""
    found: list[dict[str, str]] = [{}, {}]
    bench = load_platform("reference").workbench()

    def member(rank: int) -> None:
        group: Any = HostCommunicator(rank, 2, str(address))
        found[rank] = exercise(Wrapped(group, **methods), bench, ("float32", "bfloat16"))

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_a_lost_member_that_nobody_misses() -> None:
    bench = load_platform("reference").workbench()

    class Alone:
        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    class Broken:
        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("connection closed by peer")

    assert not notices(Alone(), bench)  # type: ignore[arg-type]
    assert notices(Broken(), bench)  # type: ignore[arg-type]


def test_members_that_find_nothing_or_wait_for_ever(
    shelf: Shelf, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check ends at its deadline, and says what the process said last."""
    monkeypatch.setattr(collective_checks, "_DEADLINE_S", 3.0)
    package = tmp_path / "dovetail_conformance_stand_in.py"
    for source, said in (
        ("import sys; sys.exit('no network')", "ended with status 1 and found nothing: no network"),
        ("import time; time.sleep(60)", "did not end and found nothing"),
    ):
        package.write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(collective_checks, "_PEER", "dovetail_conformance_stand_in")
        outcome = look(load_platform("reference"), shelf, "collectives.all_reduce")
        assert outcome.status == "fail" and said in outcome.reason
