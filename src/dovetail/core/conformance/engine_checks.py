"""Level 3: what a runner promises beside right tokens: shapes, copies, memory, plans, errors."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dovetail.core.batch import Batch, LogprobArrays, StepOutput
from dovetail.core.config.checkpoint import read_facts
from dovetail.core.config.installed import resolve_installed
from dovetail.core.config.schema import EngineConfig
from dovetail.core.conformance.base import (
    Check,
    CheckFailedError,
    expect,
    expect_equal,
    require,
)
from dovetail.core.conformance.checkpoints import write_file
from dovetail.core.conformance.engine import Engine, compare
from dovetail.core.conformance.oracle import Wish
from dovetail.core.conformance.shelf import GREEDY, PROMPTS, prompt_of
from dovetail.core.conformance.subject import Subject
from dovetail.core.conformance.token_checks import greedy_wishes
from dovetail.core.contracts.runner import CacheSpec, Pending, Runner
from dovetail.core.errors import (
    CheckpointError,
    OutOfMemoryError,
    UnsupportedError,
    UserError,
)
from dovetail.core.models.shard import Shard
from dovetail.core.request import SamplingParams

__all__ = ["TO_DEVICE", "TO_HOST", "checks"]

TO_DEVICE, TO_HOST = 16, 4
"""The most copies of a decode step, whatever the number of its rows."""
_WATCHED_STEPS = 20
_FAR_TOO_MUCH = 1 << 50
"""Bytes that no device has."""
_CACHE_BYTES = 256 << 20
"""The most of a cache whose coming and going must show where memory() shows anything; otherwise an
eighth of what is free."""
_FEW_TOKENS = 12
_POOL = 24
"""Blocks, so few that requests get each other's."""
_LONG = 200
"""Tokens of a prompt that takes several steps."""


def checks(subject: Subject) -> Iterator[Check]:
    """All of them."""
    for name, (function, statement) in _CHECKS.items():
        yield Check(name=f"engine.{name}", level=3, statement=statement, function=function)


def _dtype(subject: Subject) -> str:
    return subject.capabilities.dtypes[0]


def _outputs(subject: Subject) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2)
    wishes = [Wish(prompt=prompt, params=params) for prompt in PROMPTS[:3]]
    with subject.open("llama", dtype=_dtype(subject), wrap=_Checked) as engine:
        engine.answer(wishes)


class _Checked:
    """A runner whose every answer is looked at."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def step(self, batch: Batch) -> Pending:
        return _CheckedStep(batch, self._runner.step(batch))


class _CheckedStep:
    def __init__(self, batch: Batch, pending: Pending) -> None:
        self._batch = batch
        self._pending = pending

    def result(self) -> StepOutput:
        """Raises CheckFailedError if an array is not what the contract says."""
        output, rows = self._pending.result(), len(self._batch.sampled)
        expect(isinstance(output, StepOutput), f"a step gave a {type(output).__name__}")
        width = output.token_ids.shape[-1]
        _expect_array("token_ids", output.token_ids, np.int32, (rows, width))
        _expect_array("num_tokens", output.num_tokens, np.int32, (rows,))
        _expect_array("finite", output.finite, np.bool_, (rows,))
        expect(bool(output.finite.all()), "finite is False for logits that are")
        if output.logprobs is not None:
            _expect_logprobs(output.logprobs, rows)
        return output


def _expect_logprobs(arrays: LogprobArrays, rows: int) -> None:
    width = arrays.token_ids.shape[-1]
    _expect_array("logprobs.token_ids", arrays.token_ids, np.int32, (rows, width))
    _expect_array("logprobs.logprobs", arrays.logprobs, np.float32, (rows, width))
    _expect_array("logprobs.ranks", arrays.ranks, np.int32, (rows,))


def _expect_array(what: str, array: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise CheckFailedError(f"{what} is a {type(array).__name__}, not a numpy array")
    expect_equal(f"dtype of {what}", array.dtype, np.dtype(dtype))
    expect_equal(f"shape of {what}", array.shape, shape)


def _shapes(subject: Subject) -> None:
    require(subject.capabilities.static_shapes, "shapes are not static: a new one costs nothing")
    with subject.platform.watch() as warming:
        engine = subject.open("llama", dtype=_dtype(subject))
    known = set(warming.shapes)
    with engine, subject.platform.watch() as activity:
        engine.answer(_variety(subject))
    new = sorted(map(str, activity.shapes - known))
    expect(not new, f"{len(new)} new shapes after the warm-up, such as {'; '.join(new[:3])}")


def _variety(subject: Subject) -> list[Wish]:
    """Requests of many lengths and kinds, as many as a warm-up may have overlooked."""
    features, random = subject.capabilities.features, np.random.default_rng(3)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 1.0, "repetition_penalty": 1.2, "logit_bias": {5: 1.0}},
    ]
    if "prompt_logprobs" in features:
        kinds.append({"temperature": 0.0, "prompt_logprobs": 2})
    lengths = (1, 2, 3, 5, 11, 23, 47, 60, 95, 130)
    return [
        Wish(
            prompt=prompt_of(length, random),
            params=SamplingParams(max_tokens=3 + number, **kinds[number % len(kinds)]),
            seed=number,
        )
        for number, length in enumerate(lengths)
    ]


def _copies(subject: Subject) -> None:
    with subject.open("llama", dtype=_dtype(subject)) as engine:
        for num_rows in (1, 4):
            for params in (GREEDY, SamplingParams(temperature=1.0, top_p=0.9, max_tokens=64)):
                _watch_decode(subject, engine, num_rows, params)


def _watch_decode(subject: Subject, engine: Engine, num_rows: int, params: SamplingParams) -> None:
    numbers = [
        engine.add(Wish(prompt=prompt, params=params, seed=1)) for prompt in PROMPTS[:num_rows]
    ]
    for _ in range(16):
        engine.core.step()
    with subject.platform.watch() as activity:
        for _ in range(_WATCHED_STEPS):
            engine.core.step()
    engine.core.abort(numbers)
    while engine.core.has_work():
        engine.core.step()
    for what, seen, limit in (
        ("to the device", activity.to_device, TO_DEVICE),
        ("to the host", activity.to_host, TO_HOST),
    ):
        per_step = seen / _WATCHED_STEPS
        expect(
            per_step <= limit,
            f"a decode step of {num_rows} rows makes {per_step:.1f} copies {what}; at most {limit}"
            " are allowed",
        )


def _runner(subject: Subject, folder: Path, **settings: Any) -> Runner:
    """A runner of a checkpoint, with nothing loaded."""
    intent = EngineConfig.from_kwargs(
        model=str(folder), dtype=_dtype(subject), max_num_seqs=4, max_num_batched_tokens=48,
        **settings,
    )  # fmt: skip
    resolved = resolve_installed(intent, read_facts(intent), subject.platform)
    return subject.platform.runner(resolved.runner_config())


def _plan(subject: Subject) -> None:
    for family in ("llama", "mistral"):
        runner = _runner(subject, subject.shelf.checkpoint(family))
        try:
            plan = runner.plan()
        except UserError as error:
            raise UnsupportedError(f"nothing is known before loading: {error}") from error
        read = max((total for _, total in runner.load()), default=0)
        spec, choices = runner.cache_spec(), runner.describe()
        runner.close()
        expect_equal(f"{family}: bytes per block", plan.bytes_per_block, spec.bytes_per_block)
        expect_equal(f"{family}: window", plan.window, spec.window)
        for topic, choice in plan.choices.items():
            expect_equal(f"{family}: what was chosen for {topic}", choices.get(topic), choice)
        expect(plan.step_bytes >= 0, f"step_bytes is {plan.step_bytes}")
        item = {"float32": 1.0}.get(_dtype(subject), 0.5)
        expect(
            0.9 * item * read <= plan.weight_bytes <= 1.3 * item * read,
            f"{family}: planned {plan.weight_bytes} bytes of weights; the file has"
            f" {read} in float32",
        )


def _out_of_memory(subject: Subject) -> None:
    def too_much(runner: Runner, spec: CacheSpec) -> None:
        num_blocks = _FAR_TOO_MUCH // spec.bytes_per_block
        try:
            runner.allocate(num_blocks)
        except OutOfMemoryError as error:
            expect(bool(str(error).strip()), "OutOfMemoryError says nothing")
            return
        raise CheckFailedError(f"{num_blocks} blocks, 2**50 bytes, were allocated")

    short = msgspec.structs.replace(GREEDY, max_tokens=4)
    with subject.open("llama", dtype=_dtype(subject), before_allocate=too_much) as engine:
        answers = engine.answer([Wish(prompt=PROMPTS[1], params=short)])
        expect_equal("tokens after running out of memory", len(answers[0].token_ids), 4)


def _broken_checkpoint(subject: Subject) -> None:
    whole = subject.shelf.checkpoint("llama")
    names = list(Shard(whole / "model.safetensors").entries)
    folder = subject.shelf.folder / f"broken-{subject.name}"
    for kind, make in (("cut", _cut), ("incomplete", _incomplete)):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        make(folder / "model.safetensors")
        try:
            for _ in _runner(subject, folder).load():
                pass
        except CheckpointError as error:
            named = any(name in str(error) for name in names)
            expect(named, f"the error for a file that is {kind} names no tensor: {error}")
        else:
            raise CheckFailedError(f"a checkpoint whose file is {kind} was loaded")


def _cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])


def _incomplete(file: Path) -> None:
    shard = Shard(file)
    kept = {name: shard.tensor(name).copy() for name in sorted(shard.entries)[:-1]}
    write_file(file.with_suffix(".part"), kept)
    file.with_suffix(".part").replace(file)


def _memory_returned(subject: Subject) -> None:
    for _ in range(2):
        before = _free(subject)
        size = min(_CACHE_BYTES, before // 8)
        runner = _runner(subject, subject.shelf.checkpoint("llama"))
        for _ in runner.load():
            pass
        num_blocks = size // runner.cache_spec().bytes_per_block
        require(num_blocks > 0, "there is no free memory to see anything by")
        runner.allocate(num_blocks)
        taken = before - _free(subject)
        runner.close()
        del runner
        gc.collect()
        shown = 0.9 * size < taken < 1.2 * size
        require(shown, "memory() does not show what a runner holds")
        kept = before - _free(subject)
        expect(
            kept < 0.1 * size,
            f"{kept} of {taken} bytes are still taken after close()",
        )


def _free(subject: Subject) -> int:
    subject.platform.synchronize()
    return subject.platform.memory().free


def _close(subject: Subject) -> None:
    subject.needs_dtype("float32")
    for _ in range(2):
        with subject.open("llama") as engine:
            wishes = greedy_wishes()[:2]
            compare(wishes, engine.answer(wishes), subject.shelf.greedy("llama")[:2])


def _bad_request(subject: Subject) -> None:
    subject.needs_dtype("float32")
    folder, token = subject.shelf.with_bad_token()
    params = msgspec.structs.replace(GREEDY, max_tokens=_FEW_TOKENS)
    wishes = [Wish(prompt=prompt, params=params) for prompt in PROMPTS[:3]]
    want = [told.token_ids[:_FEW_TOKENS] for told in subject.shelf.greedy("llama")[:3]]
    bad = [Wish(prompt=(*PROMPTS[0], token, 5), params=params)] * 2
    with subject.open(
        "llama", folder=folder, num_gpu_blocks_override=_POOL, enable_prefix_caching=False
    ) as engine:
        got = [answer.token_ids for answer in engine.answer(wishes, doomed=bad)]
        expect_equal("tokens beside a request without numbers", got, want)
        _leave_behind(engine, Wish(prompt=(token,) * _LONG, params=params))
        got = [answer.token_ids for answer in engine.answer(wishes)]
        expect_equal("tokens in KV blocks of a request without numbers", got, want)


def _leave_behind(engine: Engine, wish: Wish) -> None:
    """Give a request up before it shows what it is, until every block has been its own."""
    seen = 0
    while seen < 2 * _POOL * engine.resolved.block_size:
        number = engine.add(wish)
        engine.core.step()
        engine.core.step()
        engine.core.abort([number])
        while engine.core.has_work():
            engine.core.step()
        seen += min(_LONG, 2 * engine.resolved.max_num_batched_tokens)


_CHECKS: dict[str, tuple[Callable[[Subject], None], str]] = {
    "outputs": (_outputs, "What a step gives has the shapes and dtypes of the contract."),
    "shapes": (_shapes, "After the warm-up no new shape is compiled."),
    "copies": (
        _copies,
        f"A decode step copies at most {TO_DEVICE} arrays to the device and {TO_HOST} back.",
    ),
    "plan": (_plan, "What is planned before loading is what loading then says."),
    "out_of_memory": (
        _out_of_memory,
        "Too large a cache is a clean error, and a smaller one fits.",
    ),
    "broken_checkpoint": (
        _broken_checkpoint,
        "A broken checkpoint is an error that names a tensor.",
    ),
    "memory_returned": (_memory_returned, "A closed runner gives its memory back."),
    "bad_request": (
        _bad_request,
        "A request whose values are no numbers fails alone, and what it leaves harms nobody.",
    ),
    "reopened": (_close, "After one runner is closed the next one works."),
}
