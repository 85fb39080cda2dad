"""When requests are sent: an open loop, in which nobody waits for an answer before asking."""

from __future__ import annotations

import math

import numpy as np

from dovetail.core.errors import ConfigError

__all__ = ["arrival_times"]


def arrival_times(
    count: int, rate: float, rng: np.random.Generator, *, burstiness: float = 1.0
) -> list[float]:
    """Seconds after the start at which each request is sent, in order; the first is at 0.

    The gaps follow a gamma distribution, scaled so that the whole takes exactly
    ``(count - 1) / rate`` seconds: runs with different seeds offer the same load.

    Args:
        count: Number of requests.
        rate: Requests per second; infinity sends all at once.
        rng: Decides the gaps.
        burstiness: Shape of the distribution. 1 is a Poisson process, less comes in bursts, more
            is more even, and infinity is perfectly even.
    """
    if not rate > 0 or not burstiness > 0:
        raise ConfigError("the request rate and the burstiness must be above 0")
    if math.isinf(rate) or count < 2:
        return [0.0] * count
    even = math.isinf(burstiness)
    gaps = np.ones(count - 1) if even else rng.gamma(burstiness, 1.0, count - 1)
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    scaled: list[float] = (times * ((count - 1) / rate / times[-1])).tolist()
    return scaled
