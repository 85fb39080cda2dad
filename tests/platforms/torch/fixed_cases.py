"""Rows of every kind, for what chooses all of them in one call."""

import numpy as np
import torch

from dovetail.core.request import SamplingParams
from dovetail.platforms.torch.sampling.weights import Controls
from tests.platforms.torch.sampling_cases import batch_of

LAST = 1 - 2.0**-24

KINDS = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(top_k=1),
    SamplingParams(temperature=1.3, top_k=5),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=0.7, top_k=50, top_p=0.95),
    SamplingParams(temperature=0.9, top_k=20, min_p=0.02),
    SamplingParams(temperature=1.2, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02),
    SamplingParams(temperature=2.0, top_p=0.999),
    SamplingParams(temperature=5.0, top_k=3000, top_p=0.99),
]
"""Each of temperature, top_k, top_p and min_p, and their combinations."""


def controls_of(params, vocab, noise):
    """On the host."""
    return Controls.unpack(
        torch.from_numpy(Controls.pack(batch_of(params, vocab, noise=noise).sampling))
    )


def choice_cases(st, vocabs=(1, 2, 5, 63, 65, 200, 700, 5000)):
    """Logits with few distinct values, so that ties are everywhere, any controls, and noise."""

    @st.composite
    def cases(draw):
        vocab, count = draw(st.sampled_from(vocabs)), draw(st.integers(1, 4))
        rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
        x = rng.normal(size=(count, vocab)) * draw(st.sampled_from([0.0, 0.02, 1.0, 4.0, 30.0]))
        step = draw(st.sampled_from([0.0, 0.25, 1.0, 8.0]))
        if step:
            x = np.round(x / step) * step
        x[rng.random(x.shape) < draw(st.sampled_from([0.0, 0.5]))] = -np.inf
        x[:, rng.integers(vocab)] = 0.0
        x[:, rng.integers(vocab)] = -0.0
        params = [
            SamplingParams(
                temperature=draw(st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0, 100.0])),
                top_k=min(vocab, draw(st.sampled_from([0, 0, 1, 2, 50, 65, 600, 1500, vocab]))),
                top_p=draw(st.sampled_from([1.0, 1.0, 1e-6, 0.25, 0.5, 0.95, 0.9999])),
                min_p=draw(st.sampled_from([0.0, 0.0, 1e-4, 0.1, 1.0])),
            )
            for _ in range(count)
        ]
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        levels = st.sampled_from([0.0, 0.3, 0.77, LAST])
        noise = draw(st.lists(levels, min_size=count, max_size=count))
        return torch.tensor(x, dtype=torch.float32).to(dtype), params, noise

    return cases()


def odd_rows(vocab, dtype=torch.float32):
    """Rows with NaN of both signs, with infinities, all minus infinity, and one token left."""
    x = torch.zeros(8, vocab)
    x[0, vocab // 2] = torch.nan
    x[1, -1] = -torch.tensor(torch.nan)
    x[2, 1] = torch.inf
    x[3] = -torch.inf
    x[4] = torch.nan
    x[5, ::2], x[5, 3] = torch.inf, torch.nan
    x[6], x[6, vocab - 2] = -torch.inf, -3.0
    x[7, :5] = -torch.inf
    return x.to(dtype)
