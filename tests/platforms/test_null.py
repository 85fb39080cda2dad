"""The platform that computes nothing honours the runner contract all the same."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dovetail.core.batch import Batch, PromptLogprobNeed, SamplingBatch
from dovetail.core.contracts.platform import API_VERSION, Platform
from dovetail.core.contracts.runner import Runner, RunnerConfig
from dovetail.core.errors import CheckpointError, ConfigError, OutOfMemoryError
from dovetail.platforms.null import PLUGIN, NullPlatform


def config(hf_config: dict[str, Any] | None = None, **options: Any) -> RunnerConfig:
    return RunnerConfig(
        model_path=Path("nowhere"),
        hf_config={"vocab_size": 100} if hf_config is None else hf_config,
        model_impl="native",
        load_format="dummy",
        dtype="float32",
        kv_dtype="auto",
        block_size=16,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        options=options,
    )


def batch(
    num_rows: int, *, num_logprobs: int | None = None, prompt: PromptLogprobNeed | None = None
) -> Batch:
    ones, none = np.ones(num_rows, np.int32), np.zeros(0, np.int32)
    floats = np.zeros(num_rows, np.float32)
    sampling = SamplingBatch(
        temperature=floats,
        top_k=ones,
        top_p=floats,
        min_p=floats,
        uniform=floats,
        num_generated=ones,
        all_greedy=True,
        restricts=False,
        shapes_logits=False,
        num_logprobs=num_logprobs,
    )
    return Batch(
        step=0,
        rows=np.arange(num_rows, dtype=np.int32),
        query_lens=ones,
        context_lens=ones,
        block_tables=np.zeros((num_rows, 1), np.int32),
        token_ids=ones,
        carried=none,
        carried_rows=none,
        sampled=np.arange(num_rows, dtype=np.int32),
        sampling=sampling,
        copies=np.zeros((0, 2), np.int32),
        prompt_logprobs=prompt,
    )


def runner(hf_config: dict[str, Any] | None = None, **options: Any) -> Runner:
    return NullPlatform().runner(config(hf_config, **options))


def test_the_plugin_is_usable_everywhere_and_never_chosen_by_itself() -> None:
    assert PLUGIN.api_version == API_VERSION
    assert PLUGIN.priority is None
    assert PLUGIN.probe().usable
    platform = PLUGIN.create()
    assert isinstance(platform, Platform)
    assert platform.device_names() == ["nothing"]
    assert platform.memory().free <= platform.memory().total


def test_the_whole_life_of_a_runner() -> None:
    made = runner(memory=16 * 1024 * 10)
    assert list(made.load()) == []
    spec = made.cache_spec()
    assert spec.bytes_available // spec.bytes_per_block == 10
    made.allocate(10)
    assert list(made.warm_up()) == []
    output = made.step(batch(3)).result()
    assert output.token_ids.tolist() == [[0], [0], [0]]
    assert output.num_tokens.tolist() == [1, 1, 1]
    assert output.finite.tolist() == [True, True, True]
    assert output.logprobs is None
    assert output.prompt_logprobs is None
    assert "computes nothing" in made.describe()["null"]
    made.close()


def test_a_cache_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OutOfMemoryError, match="11 KV blocks need 180224 bytes; 163840 are free"):
        runner(memory=16 * 1024 * 10).allocate(11)


def test_a_step_without_sampled_rows_gives_no_tokens() -> None:
    output = runner().step(batch(0)).result()
    assert output.token_ids.shape == (0, 1)


@pytest.mark.parametrize(
    ("eos", "token"), [(None, 0), (0, 1), ([0, 1, 5], 2), (list(range(100)), 0)]
)
def test_the_token_does_not_end_the_text(eos: Any, token: int) -> None:
    made = runner({"vocab_size": 100, "eos_token_id": eos})
    assert made.step(batch(1)).result().token_ids.tolist() == [[token]]


def test_the_token_is_an_option() -> None:
    assert runner(token=7).step(batch(2)).result().token_ids.tolist() == [[7], [7]]


def test_the_arrays_are_shared_and_read_only() -> None:
    made = runner()
    output = made.step(batch(4)).result()
    assert made.step(batch(4)).result() is output
    with pytest.raises(ValueError, match="read-only"):
        output.token_ids[0, 0] = 1


def test_log_probabilities_are_those_of_a_uniform_model() -> None:
    need = PromptLogprobNeed(
        token_index=np.array([0, 1], np.int32), target=np.array([9, 8], np.int32), num_logprobs=1
    )
    output = runner(token=7).step(batch(3, num_logprobs=2, prompt=need)).result()
    assert output.logprobs is not None
    assert output.logprobs.token_ids.tolist() == [[7, 0, 1]] * 3
    assert np.allclose(output.logprobs.logprobs, -np.log(100))
    assert output.logprobs.ranks.tolist() == [1, 1, 1]
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs.token_ids.tolist() == [[9, 0], [8, 0]]


@pytest.mark.parametrize("size", [None, 0, -1, "100", True])
def test_a_config_without_a_vocabulary_is_refused(size: Any) -> None:
    with pytest.raises(CheckpointError, match="vocab_size"):
        runner({"vocab_size": size})


@pytest.mark.parametrize(
    "options",
    [{"memory": 0}, {"memory": "1"}, {"token": 100}, {"token": -1}, {"tokens": 1}, {"step_us": 0}],
)
def test_a_wrong_option_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        runner(**options)


def test_a_step_costs_next_to_nothing() -> None:
    made, step = runner(), batch(8)
    started = time.process_time()
    for _ in range(1000):
        made.step(step).result()
    assert time.process_time() - started < 0.3


def test_it_needs_no_torch() -> None:
    program = (
        "import sys; from dovetail.platforms.null import PLUGIN; PLUGIN.create();"
        " sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
