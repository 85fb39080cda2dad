"""Fewer events that still go wrong: by halves, then by quarters, down to single ones."""

from __future__ import annotations

import dataclasses

from dovetail.core.simulate.workload import Scenario
from dovetail.core.simulate.world import run

__all__ = ["keep", "shrink"]


def keep(scenario: Scenario, indices: list[int]) -> Scenario:
    """The scenario with only these of its events, by number from 0."""
    events = tuple(scenario.events[index] for index in indices)
    return dataclasses.replace(scenario, events=events)


def shrink(scenario: Scenario, *, most_runs: int = 300) -> list[int]:
    """The numbers of events of which none can be left out without the failure going away.

    Any failure counts, not only the first one. Delta debugging (Zeller, "Yesterday, my program
    worked", 1999), given up after ``most_runs`` runs with the fewest events so far.
    """
    kept, size, runs = list(range(len(scenario.events))), len(scenario.events), 0
    while size >= 1 and runs < most_runs:
        start = 0
        while start < len(kept) and runs < most_runs:
            fewer = kept[:start] + kept[start + size :]
            runs += 1
            if run(keep(scenario, fewer)).failure is not None:
                kept = fewer
            else:
                start += size
        size //= 2
    return kept
