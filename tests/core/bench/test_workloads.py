import json

import numpy as np
import pytest

from dovetail.core.bench.arrivals import arrival_times
from dovetail.core.bench.named import WORKLOADS
from dovetail.core.bench.workloads import (
    Lengths,
    prefix_repetition_samples,
    random_samples,
    sharegpt_samples,
)
from dovetail.core.errors import ConfigError


def rng(seed=0):
    return np.random.default_rng(seed)


class Words:
    """A tokenizer of which each word is a token."""

    def encode(self, text, *, add_special_tokens=True):
        return list(range(len(text.split())))


def test_random_lengths_are_exact():
    samples = random_samples(5, Lengths(input_len=7, output_len=3, prefix_len=2), 50, rng())
    assert {(s.prompt_len, s.output_len) for s in samples} == {(9, 3)}
    assert len({tuple(s.token_ids[:2]) for s in samples}) == 1
    assert len({tuple(s.token_ids) for s in samples}) == 5
    assert all(0 <= t < 50 for s in samples for t in s.token_ids)


def test_random_lengths_vary_by_the_ratio():
    samples = random_samples(400, Lengths(input_len=10, output_len=4, range_ratio=0.5), 50, rng())
    assert {s.prompt_len for s in samples} == set(range(5, 16))
    assert {s.output_len for s in samples} == {2, 3, 4, 5, 6}


def test_the_same_seed_gives_the_same_samples():
    lengths = Lengths(input_len=10, range_ratio=0.5)
    assert random_samples(3, lengths, 50, rng(1)) == random_samples(3, lengths, 50, rng(1))
    assert random_samples(3, lengths, 50, rng(1)) != random_samples(3, lengths, 50, rng(2))


@pytest.mark.parametrize("wrong", [{"range_ratio": 1.0}, {"input_len": 0}, {"prefix_len": -1}])
def test_lengths_that_make_no_sense(wrong):
    with pytest.raises(ConfigError):
        Lengths(**wrong)


def test_prefixes_are_repeated():
    samples = prefix_repetition_samples(
        8,
        num_prefixes=2,
        prefix_len=5,
        suffix_len=3,
        output_len=1,
        vocab_size=50,
        rng=rng(),
    )
    assert {s.prompt_len for s in samples} == {8}
    assert len({tuple(s.token_ids[:5]) for s in samples}) == 2
    assert len({tuple(s.token_ids) for s in samples}) == 8
    with pytest.raises(ConfigError, match="from 1 to 1"):
        prefix_repetition_samples(
            1, num_prefixes=2, prefix_len=1, suffix_len=1, output_len=1, vocab_size=5, rng=rng()
        )


@pytest.fixture
def conversations(tmp_path):
    def turns(*lengths):
        return {"conversations": [{"from": "x", "value": "w " * length} for length in lengths]}

    file = tmp_path / "sharegpt.json"
    entries = [
        turns(5, 6, 7),
        turns(3, 9),  # too short a prompt
        turns(9, 3),  # too short an answer
        turns(1025, 9),  # too long a prompt
        turns(1000, 1100),  # too long together
        turns(8),  # one turn only
        turns(20, 30),
    ]
    file.write_text(json.dumps(entries))
    return file


def test_sharegpt_is_filtered(conversations):
    samples = sharegpt_samples(conversations, 2, Words(), rng())
    assert {(s.prompt_len, s.output_len) for s in samples} == {(5, 6), (20, 30)}
    assert all(s.text for s in samples)


def test_sharegpt_repeats_where_there_are_too_few(conversations):
    assert len(sharegpt_samples(conversations, 5, Words(), rng())) == 5


def test_sharegpt_with_one_output_length(conversations):
    samples = sharegpt_samples(conversations, 3, Words(), rng(), output_len=2, shuffle=False)
    assert [(s.prompt_len, s.output_len) for s in samples] == [(5, 2), (9, 2), (1000, 2)]


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '[{"conversations": [1, 2]}]', "[]"])
def test_files_that_are_not_sharegpt(tmp_path, content):
    file = tmp_path / "f.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"ShareGPT|usable length"):
        sharegpt_samples(file, 1, Words(), rng())


def test_arrivals_all_at_once():
    assert arrival_times(3, float("inf"), rng()) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0, float("inf")])
def test_arrivals_keep_the_rate_exactly(burstiness):
    times = arrival_times(101, 5.0, rng(), burstiness=burstiness)
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times[-1] == pytest.approx(20.0)


def test_burstiness_is_the_shape_of_the_gaps():
    def variation(burstiness):
        gaps = np.diff(arrival_times(20_001, 1.0, rng(), burstiness=burstiness))
        return gaps.std() / gaps.mean()

    assert variation(1.0) == pytest.approx(1.0, rel=0.05)
    assert variation(0.25) == pytest.approx(2.0, rel=0.1)
    assert variation(float("inf")) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (float("nan"), 1), (1, 0)])
def test_arrivals_that_make_no_sense(rate, burstiness):
    with pytest.raises(ConfigError):
        arrival_times(3, rate, rng(), burstiness=burstiness)


def test_nano_is_the_draw_that_others_report():
    samples = WORKLOADS["nano"].draw.samples(256, 151_936, 0)
    assert sum(sample.prompt_len for sample in samples) == 142_827
    assert sum(sample.output_len for sample in samples) == 133_966
    assert all(100 <= length <= 1024 for s in samples for length in (s.prompt_len, s.output_len))
    assert WORKLOADS["nano"].temperature == 0.6


def test_nano_stays_within_a_small_vocabulary():
    large, small = (WORKLOADS["nano"].draw.samples(3, size, 0) for size in (20_000, 50))
    assert [s.prompt_len for s in small] == [s.prompt_len for s in large]
    assert all(0 <= token < 50 for sample in small for token in sample.token_ids)


@pytest.mark.parametrize("name", [name for name in WORKLOADS if "/" in name])
def test_workloads_of_fixed_lengths_are_what_they_are_called(name):
    workload = WORKLOADS[name]
    samples = workload.draw.samples(3, 50, 1)
    assert {f"{s.prompt_len}/{s.output_len}" for s in samples} == {name}
    assert workload.num_prompts == 256
    assert samples != workload.draw.samples(3, 50, 2)
