"""Level 3 fails what it must: a runner or a model of the reference platform is broken at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from dovetail.core.batch import Batch, StepOutput
from dovetail.core.conformance.shelf import Shelf
from dovetail.core.contracts.ops import OpTable
from dovetail.core.contracts.platform import Memory
from dovetail.core.contracts.workbench import Activity
from dovetail.core.errors import OutOfMemoryError, UnsupportedError
from dovetail.core.plugins.selection import load_platform
from dovetail.platforms.torch.integer_ops import IntegerWeight
from dovetail.platforms.torch.ops import references
from tests.core.conformance.subjects import Wrapped, broken, capable, look

OPS = references()


def running(*, base: dict[str, Any] | None = None, **methods: Any) -> Any:
    """A platform whose runners have these methods replaced."""
    reference = load_platform("reference")
    return broken(
        runner=lambda self, config: Wrapped(reference.runner(config), **methods), **(base or {})
    )


class Later:
    """A pending step whose output is changed."""

    def __init__(self, pending: Any, change: Callable[[StepOutput], StepOutput]) -> None:
        self._pending = pending
        self._change = change

    def result(self) -> StepOutput:
        return self._change(self._pending.result())


def outputs(change: Callable[[StepOutput], StepOutput]) -> Callable[..., Any]:
    return lambda own, batch: Later(own(batch), change)


def batches(change: Callable[[Batch], Batch]) -> Callable[..., Any]:
    return lambda own, batch: own(change(batch))


def sampling(**fields: Any) -> Callable[..., Any]:
    """Steps whose rows choose in another way."""

    def change(batch: Batch) -> Batch:
        rows = len(batch.sampling.temperature)
        arrays = {
            name: np.full(rows, value, getattr(batch.sampling, name).dtype)
            if isinstance(value, int | float) and not isinstance(value, bool)
            else value
            for name, value in fields.items()
        }
        return replace(batch, sampling=replace(batch.sampling, **arrays))

    return batches(change)


def params(**fields: Any) -> Callable[..., Any]:
    """Rows that join with other parameters than they were given."""

    def change(batch: Batch) -> Batch:
        joined = [
            replace(row, params=msgspec.structs.replace(row.params, **fields))
            for row in batch.joined
        ]
        return replace(batch, joined=tuple(joined))

    return batches(change)


def _with_op(name: str, function: Callable[..., Any]) -> Any:
    def override(self: Any, table: OpTable) -> None:
        table.override(name, function, origin="a test")

    return broken(override_ops=override)


def _shifted(batch: Batch) -> Batch:
    """Cached positions are counted one too few."""
    return replace(batch, context_lens=np.maximum(batch.context_lens - 1, 0))


def _blind(batch: Batch) -> Batch:
    """What is in the cache is not looked at where a prompt goes on behind it."""
    if batch.num_tokens == batch.num_rows:
        return batch
    return replace(batch, context_lens=np.zeros_like(batch.context_lens))


def test_an_op_that_is_off_changes_tokens(shelf: Shelf) -> None:
    platform = _with_op("rotary", lambda x, cos, sin: OPS["rotary"](x, cos, -sin))
    for family in ("llama", "gemma2"):
        outcome = look(platform, shelf, f"tokens.{family}")
        assert outcome.status == "fail" and "oracle's two likeliest" in outcome.reason
    assert look(platform, shelf, "tokens.gpt2").status == "pass"


WRONG_STEPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "positions": ("tokens.llama", batches(_shifted)),
    "prompts that forget their first pieces": ("tokens.mistral", batches(_blind)),
    "cached prefixes that are not read": ("tokens.prefix_cache", batches(_blind)),
    "top_k": ("tokens.sampling.top_k", sampling(top_k=384)),
    "top_p": ("tokens.sampling.top_p", sampling(top_p=1.0)),
    "min_p": ("tokens.sampling.min_p", sampling(min_p=0.0)),
    "temperature": ("tokens.sampling.temperature", sampling(temperature=1.0)),
    "noise": ("tokens.sampling.together", sampling(uniform=0.5)),
    "everything greedy": ("tokens.sampling.temperature", sampling(all_greedy=True)),
    "bias": ("features.logit_bias", params(logit_bias={})),
    "allowed tokens": ("features.allowed_token_ids", params(allowed_token_ids=[])),
    "repetition": ("features.repetition_penalty", params(repetition_penalty=1.0)),
    "frequency": ("features.frequency_penalty", params(frequency_penalty=0.0)),
    "presence": ("features.presence_penalty", params(presence_penalty=0.0)),
    "min_tokens": ("features.min_tokens", params(min_tokens=0)),
    "bad words": ("features.bad_words", params(bad_words_token_ids=[])),
    "masks": ("features.structured_output", sampling(masks=None)),
}


@pytest.mark.parametrize("what", WRONG_STEPS)
def test_steps(what: str, shelf: Shelf) -> None:
    name, step = WRONG_STEPS[what]
    assert look(running(step=step), shelf, name).status == "fail"


def _none_right(output: StepOutput) -> StepOutput:
    """Drafts are never accepted."""
    return replace(output, num_tokens=np.minimum(output.num_tokens, 1))


def _reversed(output: StepOutput) -> StepOutput:
    return replace(output, token_ids=output.token_ids[:, ::-1].copy())


@pytest.mark.parametrize("change", [_none_right, _reversed])
def test_speculation(change: Callable[[StepOutput], StepOutput], shelf: Shelf) -> None:
    assert look(running(step=outputs(change)), shelf, "features.speculation").status == "fail"


def _logprobs(scale: float) -> Callable[..., Any]:
    def change(output: StepOutput) -> StepOutput:
        if output.logprobs is None:
            return output
        wrong = replace(output.logprobs, logprobs=output.logprobs.logprobs * np.float32(scale))
        return replace(output, logprobs=wrong)

    return outputs(change)


def _ranks(output: StepOutput) -> StepOutput:
    if output.logprobs is None:
        return output
    return replace(output, logprobs=replace(output.logprobs, ranks=output.logprobs.ranks + 1))


def _prompts(output: StepOutput) -> StepOutput:
    if output.prompt_logprobs is None:
        return output
    rolled = np.roll(output.prompt_logprobs.logprobs, 1, 0)
    return replace(output, prompt_logprobs=replace(output.prompt_logprobs, logprobs=rolled))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("tokens.logprobs.float32", _logprobs(1.01)),
        ("tokens.logprobs.float32", outputs(_ranks)),
        ("tokens.logprobs.bfloat16", _logprobs(1.6)),
        ("features.prompt_logprobs", outputs(_prompts)),
        ("engine.outputs", outputs(lambda o: replace(o, token_ids=o.token_ids.astype(np.int64)))),
        ("engine.outputs", outputs(lambda o: replace(o, finite=np.zeros_like(o.finite)))),
        ("engine.outputs", outputs(lambda o: replace(o, num_tokens=o.num_tokens.tolist()))),
        ("engine.bad_request", outputs(lambda o: replace(o, finite=np.ones_like(o.finite)))),
        ("engine.bad_request", outputs(lambda o: replace(o, finite=o.finite & o.finite.all()))),
    ],
)
def test_figures(name: str, step: Callable[..., Any], shelf: Shelf) -> None:
    assert look(running(step=step), shelf, name).status == "fail"


def test_features_that_are_not_claimed_are_unsupported(shelf: Shelf) -> None:
    platform = broken(capabilities=capable(features=frozenset()))
    for name in ("bad_words", "structured_output", "speculation", "draft_model", "deterministic"):
        outcome = look(platform, shelf, f"features.{name}")
        assert outcome.status == "unsupported" and name in outcome.reason
    assert look(platform, shelf, "features.logit_bias").status == "pass"


def test_determinism_that_is_only_claimed(shelf: Shelf) -> None:
    features = frozenset({"deterministic"})
    reference = load_platform("reference")
    platform = broken(
        capabilities=capable(features=features, dtypes=("float32",)),
        runner=lambda self, config: reference.runner(replace(config, deterministic=False)),
    )
    assert look(platform, shelf, "features.deterministic").status == "fail"


def test_shapes_that_grow(shelf: Shelf) -> None:
    platform = broken(capabilities=capable(static_shapes=True))
    outcome = look(platform, shelf, "engine.shapes")
    assert outcome.status == "fail" and "new shapes" in outcome.reason


@pytest.mark.parametrize("kind", ["to_device", "to_host"])
def test_many_copies(kind: str, shelf: Shelf) -> None:
    @contextmanager
    def watch(self: Any) -> Any:
        yield Activity(**{kind: 20 * 16 + 1})

    assert look(broken(watch=watch), shelf, "engine.copies").status == "fail"


def test_plans_that_are_not_kept(shelf: Shelf) -> None:
    for change in (
        {"bytes_per_block": 7},
        {"window": 5},
        {"weight_bytes": 10},
        {"choices": {"attention": "sdpa (it is quick)"}},
    ):
        platform = running(plan=lambda own, change=change: replace(own(), **change))
        assert look(platform, shelf, "engine.plan").status == "fail", change


def _never(own: Any, num_blocks: int) -> None:
    own(min(num_blocks, 1000))


def _otherwise(own: Any, num_blocks: int) -> None:
    try:
        own(num_blocks)
    except OutOfMemoryError as error:
        raise RuntimeError(str(error)) from error


class _Stuck:
    """Nothing can be allocated once something was too large."""

    failed = False

    def __call__(self, own: Any, num_blocks: int) -> None:
        if self.failed:
            raise OutOfMemoryError("it stays full")
        self.failed = True
        own(num_blocks)


@pytest.mark.parametrize("allocate", [_never, _otherwise, _Stuck()])
def test_running_out_of_memory(allocate: Any, shelf: Shelf) -> None:
    assert look(running(allocate=allocate), shelf, "engine.out_of_memory").status == "fail"


def _lenient(own: Any) -> Any:
    try:
        yield from own()
    except Exception:
        yield 1, 1


def _vague(own: Any) -> Any:
    from dovetail.core.errors import CheckpointError

    try:
        yield from own()
    except CheckpointError as error:
        raise CheckpointError("something is wrong with the file") from error


@pytest.mark.parametrize("load", [_lenient, _vague])
def test_broken_checkpoints(load: Any, shelf: Shelf) -> None:
    assert look(running(load=load), shelf, "engine.broken_checkpoint").status == "fail"


@pytest.mark.parametrize(("returned", "status"), [(0.0, "fail"), (0.5, "fail"), (1.0, "pass")])
def test_memory(returned: float, status: str, shelf: Shelf) -> None:
    """A device that counts what is allocated, and a runner that gives some of it back."""
    taken, reference = [0.0], load_platform("reference")

    class Counting:
        def __init__(self, config: Any) -> None:
            self._inner: Any = reference.runner(config)
            self._mine = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def allocate(self, num_blocks: int) -> None:
            self._mine = num_blocks * self._inner.cache_spec().bytes_per_block
            taken[0] += self._mine

        def close(self) -> None:
            taken[0] -= returned * self._mine

    platform = broken(
        runner=lambda self, config: Counting(config),
        memory=lambda self, device=0: Memory(free=(4 << 30) - int(taken[0]), total=4 << 30),
    )
    assert look(platform, shelf, "engine.memory_returned").status == status


def test_refusing_what_is_claimed_is_no_excuse(shelf: Shelf) -> None:
    def refuse(self: Any, config: Any) -> Any:
        raise UnsupportedError("not today")

    for name in ("tokens.llama", "features.speculation", "engine.copies"):
        outcome = look(broken(runner=refuse), shelf, name)
        assert outcome.status == "fail" and "not today" in outcome.reason


def test_quantized_layers_that_are_not(shelf: Shelf) -> None:
    reference = load_platform("reference")
    platform = broken(
        runner=lambda self, config: reference.runner(replace(config, quantization=None))
    )
    assert look(platform, shelf, "features.quantization.int8").status == "fail"


def test_quantized_layers_whose_activations_are_not(shelf: Shelf) -> None:
    def unrounded(x: torch.Tensor, weight: IntegerWeight) -> torch.Tensor:
        return x @ (weight.codes * weight.scales[:, None]).T

    platform = broken(
        override_ops=lambda self, table: table.override("int8_linear", unrounded, origin="a test")
    )
    outcome = look(platform, shelf, "features.quantization.int8")
    assert outcome.status == "fail" and "half of the tokens" in outcome.reason
