"""Engines over small checkpoints, driven step by step, for tests that compare tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dovetail.core.config.schema import EngineConfig
from dovetail.core.engine.build import build_engine, ignore_progress
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import Request, SamplingParams
from dovetail.core.update import Update

GREEDY = SamplingParams(temperature=0.0, max_tokens=64, logprobs=0)


def make_core(model: Path, platform: str, **settings: Any) -> EngineCore:
    """A loaded engine in this process; float32 unless said otherwise."""
    config = EngineConfig.from_kwargs(model=str(model), **({"dtype": "float32"} | settings))
    return build_engine(config, platform, ignore_progress).core


class Answer:
    """Everything that came for one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.updates: list[Update] = []

    def add(self, update: Update) -> None:
        self.updates.append(update)
        self.token_ids += update.token_ids
        self.logprobs += [entry.logprobs[0] for entry in update.logprobs or ()]


def answer(
    core: EngineCore,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = GREEDY,
    *,
    first_id: int = 1,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Run all prompts together to their end. The pool must be whole afterwards."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    answers: Mapping[int, Answer] = {first_id + i: Answer() for i in range(len(prompts))}
    for i, (prompt, param) in enumerate(zip(prompts, each, strict=True)):
        core.add(
            Request(
                id=first_id + i,
                prompt_token_ids=list(prompt),
                params=param,
                stop_token_ids=[],
                seed=seeds[i] if seeds else i,
                arrival_time=float(i),
            )
        )
    while core.has_work():
        for update in core.step():
            assert update.error is None, update.error
            answers[update.id].add(update)
    core.scheduler.pool.check([])
    return list(answers.values())
