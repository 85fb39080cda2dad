"""From a seed to what happens: the settings of an engine, and events in order of time."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from dovetail.core.config.speculative import SpeculativeConfig
from dovetail.core.request import Request, SamplingParams
from dovetail.core.scheduler.scheduler import SchedulerConfig

__all__ = ["END_TOKEN", "VOCAB_SIZE", "Event", "EventKind", "Knobs", "Scenario", "draw"]

VOCAB_SIZE = 50
END_TOKEN = 2
_LONGEST = 96
"""Tokens: longer sequences show nothing that these do not."""

EventKind = Literal[
    "submit", "abort", "raise_at_start", "raise_in_result", "not_finite", "row_fails", "die",
    "reset_cache",
]  # fmt: skip


@dataclass(frozen=True)
class Event:
    """Something that happens at the beginning of a tick."""

    tick: int
    kind: EventKind
    requests: tuple[Request, ...] = ()
    """Those that are submitted, the parent first."""
    target: int = 0
    """The request to abort; which of the step's rows is hit."""

    def __str__(self) -> str:
        if self.kind == "submit":
            sizes = (
                f"{len(self.requests[0].prompt_token_ids)} + {self.requests[0].params.max_tokens}"
            )
            ids = [request.id for request in self.requests]
            return f"tick {self.tick}: submit {ids}, {sizes} tokens"
        return f"tick {self.tick}: {self.kind} {self.target or ''}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """The engine's settings."""

    scheduler: SchedulerConfig
    steps_ahead: int
    end_rate: float
    draft_quality: float
    """Share of the draft model's proposals that are right."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """All that is drawn from one seed."""

    seed: int
    knobs: Knobs
    events: tuple[Event, ...]


def draw(seed: int) -> Scenario:
    """The scenario of a seed; always the same."""
    rng = random.Random(seed)
    knobs = _knobs(rng)
    events = _requests(rng, knobs)
    num_ticks = 1 + max(event.tick for event in events)
    events += _aborts(rng, events)
    events += _faults(rng, num_ticks, [event.tick for event in events])
    events.sort(key=lambda event: event.tick)
    return Scenario(seed=seed, knobs=knobs, events=tuple(events))


def _knobs(rng: random.Random) -> Knobs:
    block_size = rng.choice([1, 2, 3, 4, 4, 8, 16])
    num_blocks = rng.choice([2, 3, 4, 6, 8, 12, 16, 24, 32, 64])
    max_len = min(num_blocks * block_size, _LONGEST)
    num_seqs = rng.choice([1, 2, 4, 8])
    chunked = rng.random() < 0.8
    budget = rng.choice([num_seqs, num_seqs + 3, 16, 32, 100])
    return Knobs(
        scheduler=SchedulerConfig(
            num_blocks=num_blocks + 1,
            block_size=block_size,
            max_model_len=max_len,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max(budget, num_seqs if chunked else max_len),
            vocab_size=VOCAB_SIZE,
            enable_prefix_caching=rng.random() < 0.7,
            enable_chunked_prefill=chunked,
            mixed_batches=rng.random() < 0.7,
            policy=rng.choice(["fcfs", "priority"]),
            window=rng.choice([None, None, None, 1, 5, 12]),
            speculation=_speculation(rng),
            priority_ageing_seconds=rng.choice([None, 3.0]),
            max_preemptions=rng.choice([0, 1, 4]),
            max_bypasses=rng.choice([0, 1, 8]),
        ),
        steps_ahead=rng.randrange(2),
        end_rate=rng.choice([0.0, 0.02, 0.2]),
        draft_quality=rng.choice([0.0, 0.5, 0.9, 1.0]),
    )


def _speculation(rng: random.Random) -> SpeculativeConfig | None:
    method = rng.choice(["", "", "draft_model", "draft_model", "ngram", "suffix"])
    if not method:
        return None
    return SpeculativeConfig(
        method=method,
        num_speculative_tokens=rng.choice([1, 2, 5]),
        model="an oracle" if method == "draft_model" else None,
        adaptive=rng.random() < 0.5,
        shortest_match=1,
    )


def _requests(rng: random.Random, knobs: Knobs) -> list[Event]:
    """Arrivals in bursts, of prompts with common beginnings."""
    longest = knobs.scheduler.max_model_len
    stems = [[rng.randrange(VOCAB_SIZE) for _ in range(longest)] for _ in range(3)]
    events, tick, next_id = [], 0, 1
    for _ in range(rng.randrange(1, 25)):
        tick += rng.choice([0, 0, 0, 1, 2, 5, 20])
        length = rng.randrange(1, longest)
        own = rng.randrange(0, min(4, length) + 1)
        prompt = rng.choice(stems)[: length - own]
        prompt = prompt + [rng.randrange(VOCAB_SIZE) for _ in range(own)]
        group = _group(rng, knobs, tick, next_id, prompt)
        next_id += len(group)
        events.append(Event(tick, "submit", requests=group))
    return events


def _group(
    rng: random.Random, knobs: Knobs, tick: int, first: int, prompt: list[int]
) -> tuple[Request, ...]:
    """The completions of one prompt."""
    left = knobs.scheduler.max_model_len - len(prompt)
    params = SamplingParams(
        temperature=rng.choice([0.0, 1.0]),
        max_tokens=rng.randrange(1, left + 1) if rng.random() < 0.5 else rng.randrange(1, 4),
        logprobs=rng.choice([None, None, None, 0, 2]),
        prompt_logprobs=rng.choice([None, None, None, None, 1]),
    )
    if params.max_tokens is not None and params.max_tokens > left:
        params = SamplingParams(temperature=0.0, max_tokens=left)
    stops = rng.choice([[], [END_TOKEN], [END_TOKEN, 5, 9]])
    priority, salt = rng.randrange(3), rng.choice(["", "", "a", "b"])
    num_sequences = rng.choice([1, 1, 1, 2, 4])
    grammar = rng.choice(["", "", "", "3", "20"])
    if num_sequences > 1 and not grammar and rng.random() < 0.3:
        params = SamplingParams(
            n=num_sequences, use_beam_search=True, temperature=0.0, max_tokens=params.max_tokens
        )
        num_sequences = 1
    return tuple(
        Request(
            id=first + index,
            prompt_token_ids=prompt,
            params=params,
            stop_token_ids=stops,
            seed=rng.getrandbits(63),
            arrival_time=float(tick),
            priority=priority,
            cache_salt=salt,
            parent=first if index else None,
            grammar=grammar,
        )
        for index in range(num_sequences)
    )


def _aborts(rng: random.Random, submits: list[Event]) -> list[Event]:
    """Some time after the request came; sometimes a step fails at that moment too."""
    events = []
    for _ in range(rng.choice([0, 2, 6])):
        submit = rng.choice(submits)
        tick, request = submit.tick + rng.randrange(15), rng.choice(submit.requests)
        events.append(Event(tick, "abort", target=request.id))
        if rng.random() < 0.3:
            events.append(Event(tick, "raise_in_result"))
    return events


def _faults(rng: random.Random, num_ticks: int, busy: list[int]) -> list[Event]:
    """Half of them when something else happens too."""
    kinds: list[EventKind] = [
        "raise_at_start", "raise_in_result", "not_finite", "row_fails", "die", "reset_cache",
    ]  # fmt: skip
    count = rng.choice([0, 1, 3, 8, 16])
    ticks = [rng.choice([rng.randrange(num_ticks + 20), rng.choice(busy)]) for _ in range(count)]
    return [Event(tick, rng.choice(kinds), target=rng.randrange(8)) for tick in ticks]
