"""``dovetail bench latency --fit``: the time between tokens as a line over the context."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from dovetail.core.bench.fit import LatencyFit, Point, fit_line, spread
from dovetail.core.bench.plot import latency_plot
from dovetail.core.bench.steps import StepTime, StepTimes
from dovetail.core.bench.workloads import Lengths, random_samples
from dovetail.core.cli.arguments import engine_config
from dovetail.core.cli.bench import write_json, write_picture
from dovetail.core.cli.console import Progress, emit
from dovetail.core.cli.offline import Offline, start_offline
from dovetail.core.cli.parser import UsageError
from dovetail.core.errors import ConfigError

if TYPE_CHECKING:
    from dovetail.core.bench.roofline import Roofline

__all__ = ["run_fit"]

_LEAST_OUTPUT = 8
"""Tokens per answer: a median needs a few steps."""


def run_fit(namespace: argparse.Namespace) -> int:
    """Measure at batch 1, and at the size that is given; returns the exit status."""
    config = engine_config(namespace)
    if config.speculative_config:
        raise UsageError("--fit times steps of one token each: leave --speculative-config out")
    if namespace.output_len < _LEAST_OUTPUT:
        raise UsageError(f"--fit needs an --output-len of at least {_LEAST_OUTPUT}")
    offline = start_offline(config, with_tokenizer=False)
    sizes = sorted({1, namespace.batch_size})
    namespace.disable_detokenize |= config.skip_tokenizer_init
    measured = {size: _Measurement(namespace, offline, size, config.seed) for size in sizes}
    points = {size: measurement.points() for size, measurement in measured.items()}
    roofline = offline.roofline() if namespace.roofline else None
    fits = [fit_line(size, _bounded(points[size], size, roofline)) for size in sizes]
    _report(fits, [measured[size].times for size in sizes], roofline)
    if namespace.plot:
        write_picture(namespace.plot, latency_plot(_title(offline), fits))
    if namespace.output_json:
        write_json(namespace.output_json, _result(fits, measured, roofline))
    return 0


class _Measurement:
    """Batches of one size, at several lengths of the context."""

    def __init__(
        self, namespace: argparse.Namespace, offline: Offline, batch_size: int, seed: int
    ) -> None:
        self._flags = namespace
        self._offline = offline
        self._batch_size = batch_size
        self._rng = np.random.default_rng(seed)
        self._steps: list[StepTime] = []

    @property
    def times(self) -> StepTimes:
        """All steps that were measured, those of prompts included."""
        return StepTimes(steps=tuple(self._steps))

    def points(self) -> list[Point]:
        """One for each length.

        Raises:
            ConfigError: So many sequences of such a length do not fit.
        """
        progress, longest = Progress(), self._longest()
        lengths = self._flags.context_lens or spread(longest)
        if lengths[-1] > longest:
            raise ConfigError(
                f"{self._batch_size} prompts of {lengths[-1]} tokens and answers of"
                f" {self._flags.output_len} do not fit: the longest prompt here has {longest}"
                " tokens (--max-model-len, --kv-cache-memory-bytes)"
            )
        found = []
        for length in lengths:
            progress.show(f"measuring batch {self._batch_size} at {length} tokens")
            found.append(self._point(length))
        progress.clear()
        return found

    def _longest(self) -> int:
        """Tokens of the longest prompts that leave room for their answers."""
        llm = self._offline.llm
        stats, output_len = llm.stats, int(self._flags.output_len)
        room = stats.num_blocks // self._batch_size * stats.block_size
        return max(0, min(llm.config.max_model_len, room) - output_len)

    def _point(self, length: int) -> Point:
        meter, seconds = self._offline.meter, []
        for index in range(self._flags.num_iters_warmup + self._flags.num_iters):
            meter.clear()
            self._generate(length)
            if index >= self._flags.num_iters_warmup:
                seconds += meter.times.decodes(self._batch_size)
                self._steps += meter.times.steps
        if not seconds:
            raise ConfigError(
                f"no step computed {self._batch_size} tokens, one for each request: batches of this"
                " size are cut up (--max-num-seqs)"
            )
        middle = length + self._flags.output_len / 2
        return Point(context=middle, milliseconds=median(seconds) * 1000)

    def _generate(self, length: int) -> None:
        # New prompts each time: the same ones would be found in the prefix cache.
        lengths = Lengths(input_len=length, output_len=self._flags.output_len)
        samples = random_samples(self._batch_size, lengths, self._offline.vocab_size, self._rng)
        self._offline.generate(samples, 1.0, detokenize=not self._flags.disable_detokenize)


def _bounded(
    points: Sequence[Point], batch_size: int, roofline: Roofline | None
) -> Sequence[Point]:
    """The points with what the device needs at least."""
    if roofline is None:
        return points
    return [
        replace(point, bound=roofline.decode([int(point.context)] * batch_size) * 1000)
        for point in points
    ]


def _report(
    fits: Sequence[LatencyFit], times: Sequence[StepTimes], roofline: Roofline | None
) -> None:
    for fit, steps in zip(fits, times, strict=True):
        emit(fit.describe())
        for point in fit.points:
            line = f"  {point.context:>8,.0f} tokens  {point.milliseconds:9.3f} ms"
            if point.bound is not None:
                line += f"  roofline {point.bound:9.3f} ms  {point.bound / point.milliseconds:6.1%}"
            emit(line)
        host = steps.summary()
        emit(
            f"  host per step: mean {host['host_us_mean']:.0f} us,"
            f" P99 {host['host_us_p99']:.0f} us, {host['host_share']:.1%} of the time"
        )
    if roofline is not None:
        rates = roofline.rates
        emit(
            f"The device reads {rates.read_bytes_per_second / 1e9:,.1f} GB/s and computes"
            f" {rates.matrix_flops_per_second / 1e12:,.2f} TFLOP/s, measured just now."
        )


def _result(
    fits: Sequence[LatencyFit], measured: dict[int, _Measurement], roofline: Roofline | None
) -> dict[str, Any]:
    return {
        "fits": [
            {
                "batch_size": fit.batch_size,
                "base_ms": fit.base,
                "ms_per_1000_tokens": fit.slope,
                "residual_ms": fit.residual,
                "roofline_fraction": fit.fraction,
                "points": [asdict(point) for point in fit.points],
                **measured[fit.batch_size].times.summary(),
            }
            for fit in fits
        ],
        "rates": None if roofline is None else asdict(roofline.rates),
    }


def _title(offline: Offline) -> str:
    config, devices = offline.llm.config, offline.llm.platform.device_names()
    return f"Time between tokens: {Path(config.model).name or config.model} on {devices[0]}"
