"""``dovetail bench profile``: where the time of a step goes, by class of op."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.core.cli.arguments import add_engine_arguments, engine_config
from dovetail.core.cli.bench import add_roofline_argument, number, write_json, write_picture
from dovetail.core.cli.config_file import add_config_argument
from dovetail.core.cli.console import Progress, emit
from dovetail.core.cli.offline import Offline, start_offline
from dovetail.core.cli.parser import Parser, UsageError
from dovetail.core.errors import ConfigError

if TYPE_CHECKING:
    from dovetail.core.batch import Batch
    from dovetail.core.bench.op_clock import OpClock
    from dovetail.core.bench.profile import PhaseProfile, Steps
    from dovetail.core.config.schema import EngineConfig
    from dovetail.core.contracts.platform import Rates

__all__ = ["add_arguments", "run"]

_PHASES = ("prefill", "decode")
_RUN, _SETTLING = 8, 2
"""Decode: steps in a row whose ops are timed, or not timed, and steps between two such runs."""


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""

    def add(flag: str, default: int, text: str) -> None:
        text = f"{text} Default: {default}."
        parser.add_argument(flag, type=number(flag), metavar="N", help=text, default=default)

    add("--batch-size", 1, "Requests at once.")
    add("--input-len", 512, "Tokens per prompt: the context that decoding begins with.")
    add("--num-steps", 32, "Decode: steps that are measured.")
    add("--num-iters", 3, "Prefill: batches of prompts that are measured.")
    parser.add_argument(
        "--phase", choices=(*_PHASES, "both"), default="both", help="What is profiled. "
        "Default: both."
    )  # fmt: skip
    parser.add_argument(
        "--json", "--output-json", dest="output_json", metavar="FILE", help="Write it as JSON."
    )
    parser.add_argument("--plot", metavar="FILE.svg", help="Draw it as SVG.")
    add_roofline_argument(parser)
    add_config_argument(parser)
    add_engine_arguments(parser)


def run(namespace: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    from dovetail.core.bench.profile_plot import profile_plot
    from dovetail.core.bench.profile_table import profile_table

    offline = start_offline(_engine_config(namespace), with_tokenizer=False)
    phases = _PHASES if namespace.phase == "both" else (namespace.phase,)
    measurement = _Measurement(namespace, offline)
    profiles = [measurement.profile(phase) for phase in phases]
    roofline = offline.roofline() if namespace.roofline else None
    rates = None if roofline is None else roofline.rates
    emit("\n\n".join(profile_table(profile, rates) for profile in profiles))
    if offline.llm.platform.capabilities.async_steps:
        emit(
            "\nWhile ops are timed each is waited for, and no step is replayed: what is timed is"
            " slower than what users have."
        )
    if namespace.plot:
        write_picture(namespace.plot, profile_plot(_title(offline), profiles, rates))
    if namespace.output_json:
        write_json(namespace.output_json, _result(offline, profiles, rates))
    return 0


def _engine_config(namespace: argparse.Namespace) -> EngineConfig:
    config = engine_config(namespace)
    if config.speculative_config:
        raise UsageError("a profile is of steps of one token each: leave --speculative-config out")
    return dataclasses.replace(config, skip_tokenizer_init=True, enable_prefix_caching=False)


class _Measurement:
    """Random prompts, greedy answers, by turns as users have them and with ops timed.

    Raises:
        UnsupportedError: The platform's ops cannot be watched.
    """

    def __init__(self, namespace: argparse.Namespace, offline: Offline) -> None:
        import numpy as np

        from dovetail.core.bench.op_clock import OpClock, observed
        from dovetail.core.bench.roofline import step_cost

        llm, meter = offline.llm, offline.meter
        self._flags = namespace
        self._offline = offline
        runner = observed(llm.platform, meter.runner)
        self._cost = step_cost(llm.config.runner_config(), meter.plan())
        self._ops: OpClock = OpClock(runner, llm.platform.synchronize)
        self._rng = np.random.default_rng(llm.config.seed)

    def profile(self, phase: str) -> PhaseProfile:
        """Measure one phase.

        Raises:
            ConfigError: So many requests of such a length do not fit.
        """
        from dovetail.core.bench.profile import profile_phase

        progress = Progress()
        progress.show(f"profiling {phase}")
        try:
            measured = list(self._prefills() if phase == "prefill" else self._decodes())
        finally:
            self._ops.close()
            progress.clear()
        return profile_phase(
            phase,
            self._cost,
            batch_size=self._flags.batch_size,
            input_len=self._flags.input_len,
            measured=measured,
        )

    def _prefills(self) -> Iterator[Steps]:
        """All steps of each batch of prompts, but the first batch."""
        for index in range(1 + 2 * self._flags.num_iters):
            watch = index % 2 == 0
            steps = self._generate(1, partial(self._ops.begin, watch=watch))
            if index:
                yield steps

    def _decodes(self) -> Iterator[Steps]:
        """Steps that gave one token to each row, but those between two runs."""
        wanted, size = self._flags.num_steps, self._flags.batch_size
        most = self._offline.llm.config.max_num_batched_tokens
        num_prompt_steps = -(-size * self._flags.input_len // most)
        num_runs = 2 * -(-wanted // _RUN)
        turns = _Turns(self._ops, size)
        steps = self._generate(num_prompt_steps + num_runs * (_RUN + _SETTLING) + 1, turns.begin)
        counted = [step for step, counts in zip(steps, turns.counted, strict=True) if counts]
        for is_watched in (False, True):
            found = [step for step in counted if step[1].is_watched == is_watched]
            if len(found) < wanted:
                raise ConfigError(
                    f"only {len(found)} of {wanted} steps computed {size} tokens, one for each"
                    " request: batches of this size are cut up (--max-num-seqs,"
                    " --max-num-batched-tokens)"
                )
            yield from ([step] for step in found[:wanted])

    def _generate(self, output_len: int, on_step: Callable[[Batch], None]) -> Steps:
        from dovetail.core.bench.workloads import Lengths, random_samples

        input_len = self._flags.input_len
        self._check_fits(input_len + output_len)
        lengths = Lengths(input_len=input_len, output_len=output_len)
        vocab_size = self._offline.vocab_size
        samples = random_samples(self._flags.batch_size, lengths, vocab_size, self._rng)
        meter = self._offline.meter
        meter.clear()
        self._ops.clear()
        meter.on_step = on_step
        self._offline.generate(samples, 0.0, detokenize=False)
        return list(zip(meter.times.steps, self._ops.steps, strict=True))

    def _check_fits(self, length: int) -> None:
        llm, size = self._offline.llm, self._flags.batch_size
        room = llm.stats.num_blocks // size * llm.stats.block_size
        longest = min(llm.config.max_model_len, room)
        if length > longest:
            raise ConfigError(
                f"{size} requests of {length} tokens, prompt and answer, do not fit: they may have"
                f" {longest} each (--max-model-len, --kv-cache-memory-bytes)"
            )


class _Turns:
    """Steps that decode, by turns without and with ops timed.

    The first of each run do not count: the step before may still be under way.
    """

    def __init__(self, ops: OpClock, size: int) -> None:
        self._ops = ops
        self._size = size
        self._num_decodes = 0
        self.counted: list[bool] = []
        """Of all steps: whether it is one of those that are measured."""

    def begin(self, batch: Batch) -> None:
        """Decide about the next step."""
        decodes = batch.num_rows == batch.num_tokens == self._size
        turn, place = divmod(self._num_decodes, _RUN + _SETTLING)
        self._num_decodes += decodes
        self.counted.append(decodes and place >= _SETTLING)
        self._ops.begin(batch, watch=decodes and turn % 2 == 1)


def _title(offline: Offline) -> str:
    config = offline.llm.config
    quantization = f", {config.quantization}" if config.quantization else ""
    name = Path(config.model).name or config.model
    return f"{name}, {config.dtype}{quantization}, on {offline.llm.platform.device_names()[0]}"


def _result(offline: Offline, profiles: list[PhaseProfile], rates: Rates | None) -> dict[str, Any]:
    config = offline.llm.config
    return {
        "model": str(config.runner_config().model_path),
        "platform": offline.llm.platform.name,
        "device": offline.llm.platform.device_names()[0],
        "dtype": config.dtype,
        "quantization": config.quantization,
        "choices": offline.meter.describe(),
        "rates": None if rates is None else dataclasses.asdict(rates),
        "phases": [profile.as_json(rates) for profile in profiles],
    }
