"""FlashAttention and FlashInfer, emulated, against the reference backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dovetail_cuda.flash import FlashAttention2, FlashAttention3
from dovetail_cuda.flashinfer import FlashInferAttention, decode_rows

from dovetail.attention_backends.pages import must_not_record
from dovetail.core.errors import InvariantError
from dovetail.platforms.torch.staged import recorded_sizes
from tests.attention_backends.paged import CPU, PagedBackend
from tests.attention_backends.sequences import Sequences, make_spec

pytestmark = pytest.mark.usefixtures("emulated")

HOPPER = (9, 0)


class TestFlashAttention3(PagedBackend):
    def make(self) -> Any:
        return FlashAttention3(CPU, HOPPER)


class TestFlashAttention2(PagedBackend):
    block_size = 256

    def make(self) -> Any:
        return FlashAttention2(CPU, HOPPER)


class TestFlashInfer(PagedBackend):
    def make(self) -> Any:
        return FlashInferAttention(CPU, HOPPER)

    def test_a_prefill_that_was_planned_over_is_told(self) -> None:
        spec = make_spec(size=64)
        work = Sequences(spec, self.served(spec), (20, 9))
        made = self.make()
        cache = made.allocate(spec, work.need, work.num_blocks)
        old = made.plan(work.batch([(0, 0, 20)]), work.need)
        made.plan(work.batch([(1, 0, 9)]), work.need)
        sides = (side[0] for side in (work.q, work.k, work.v))
        with pytest.raises(InvariantError, match="another step"):
            made.attend(*sides, cache, old, spec)

    def test_wrappers_are_as_few_as_sizes_and_kinds(self) -> None:
        from emulated_cuda.infer import Wrapper

        layers = self.layers((9,) * 40)
        Wrapper.made.clear()
        for count in range(40, 0, -1):
            pieces = [(i, 3, 1) for i in range(count)]
            layers.backend.plan(layers.batch(pieces), layers.need)
        sizes = {decode_rows(count) for count in range(1, 41)}
        assert sizes == {1, 2, 4, 8, 16, 24, 32, 40}
        assert len(Wrapper.made) == 3 * len(sizes)  # three kinds of layers
        assert sum(wrapper.num_plans for wrapper in Wrapper.made) == 3 * 40


def test_recorded_sizes_are_padded_no_further() -> None:
    for most in (1, 4, 8, 64, 256, 320):
        assert {decode_rows(size) for size in recorded_sizes(most)} == set(recorded_sizes(most))
    for count in range(1, 2000):
        assert count <= decode_rows(count) <= max(8, 1.8 * count)


def test_what_may_not_be_recorded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    for captures in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda on=captures: on)
        if captures:
            with pytest.raises(InvariantError, match="cannot be recorded: some row"):
                must_not_record(device, "some row has more than one token")
        else:
            must_not_record(device, "some row has more than one token")
