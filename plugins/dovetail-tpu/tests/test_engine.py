"""The engine on JAX: what is compiled, donated and copied, sampled tokens, several devices."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dovetail.core.contracts.platform import Platform
from dovetail.core.engine.core import EngineCore
from dovetail.core.errors import ConfigError, UnsupportedError
from dovetail.core.plugins.selection import load_platform
from dovetail.core.request import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engines import GREEDY, answer, make_core
from tests.thorough import every, thorough

SMALL: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
    "max_model_len": 224,
    "block_size": 32,
    "num_gpu_blocks_override": 56,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Eight KV heads, so that eight devices could share them.
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"), **heads)


@pytest.fixture(scope="module")
def core(model: Path) -> Iterator[EngineCore]:
    core = make_core(model, "tpu", **SMALL)
    yield core
    core.close()


@pytest.fixture(scope="module")
def reference(model: Path) -> EngineCore:
    return make_core(model, "reference")


@pytest.fixture(scope="module")
def platform(simulated: None) -> Platform:
    return load_platform("tpu")


def prompts(count: int = 4, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 250) for _ in range(5 + 11 * i)] for i in range(count)]


SAMPLED = [
    SamplingParams(temperature=0.8, max_tokens=24, logprobs=3),
    SamplingParams(top_k=12, max_tokens=24, logprobs=0),
    SamplingParams(top_p=0.8, temperature=1.2, max_tokens=24),
    SamplingParams(min_p=0.1, max_tokens=24, logprobs=1),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, max_tokens=24),
    SamplingParams(logit_bias={7: 4.0, 9: -50.0}, presence_penalty=0.3, max_tokens=24),
    SamplingParams(allowed_token_ids=[5, 6, 7, 8, 300], top_k=3, max_tokens=24),
    SamplingParams(min_tokens=8, stop_token_ids=[11, 12, 13, 14, 15], max_tokens=24),
]


def test_seeded_tokens_and_logprobs_equal_the_reference(
    core: EngineCore, reference: EngineCore
) -> None:
    asked = prompts(len(SAMPLED))
    seeds = [100 + i for i in range(len(asked))]
    found = answer(core, asked, SAMPLED, first_id=1000, seeds=seeds)
    wanted = answer(reference, asked, SAMPLED, first_id=1000, seeds=seeds)
    same = [(a, b) for a, b in zip(found, wanted, strict=True) if a.token_ids == b.token_ids]
    # Logits differ by some 1e-6: one draw in a thousand is so near the next token that it shows.
    assert len(same) >= len(SAMPLED) - 1
    for mine, theirs in same:
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)


def test_a_token_does_not_depend_on_the_batch(core: EngineCore) -> None:
    asked = prompts(len(SAMPLED))
    together = answer(core, asked, SAMPLED, first_id=2000, seeds=range(8))
    for i in (0, 2, 5):
        (alone,) = answer(core, asked[i : i + 1], SAMPLED[i], first_id=2100 + i, seeds=[i])
        assert alone.token_ids == together[i].token_ids


def test_prompt_logprobs_equal_the_reference(core: EngineCore, reference: EngineCore) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=2)
    asked = [[3 + i % 200 for i in range(90)]]
    tables = []
    for engine in (core, reference):
        (one,) = answer(engine, asked, params, first_id=3000)
        tables.append([entry for u in one.updates for entry in u.prompt_logprobs or () if entry])
    assert len(tables[0]) == len(tables[1]) == 89
    for mine, theirs in zip(*tables, strict=True):
        assert list(mine.token_ids) == list(theirs.token_ids)
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)


def test_after_the_warm_up_nothing_is_compiled(
    model: Path, platform: Platform, compiled: str
) -> None:
    with platform.watch() as everything:
        core = make_core(model, "tpu", **SMALL)
    assert any("compilation" in shape for shape in everything.shapes)
    assert list((Path(compiled) / "dovetail" / "xla").iterdir()), "nothing was kept"
    meter = core.runner._platform.meter  # type: ignore[attr-defined]
    with meter.watch() as serving:
        answer(core, prompts(8), SAMPLED, seeds=range(8))
        answer(core, prompts(3, seed=1), GREEDY, first_id=50)
        params = SamplingParams(temperature=0.0, n=1, prompt_logprobs=1, max_tokens=3)
        answer(core, prompts(2, seed=2), params, first_id=60)
    names = {shape[0] for shape in serving.shapes}
    assert {"forward", "sample", "score 32", "take"} <= names
    assert "compilation" not in names


def test_a_decode_step_copies_a_bounded_number_of_arrays(core: EngineCore) -> None:
    meter = core.runner._platform.meter  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0.0, max_tokens=40)
    with meter.watch() as long:
        answer(core, prompts(8), params, first_id=4000)
    num_steps = 90
    assert long.to_device < 4 * num_steps
    assert long.to_host < 3 * num_steps


def test_caches_are_donated_and_change_in_place(model: Path, compiled: str) -> None:
    core = make_core(model, "tpu", **SMALL)
    runner: Any = core.runner
    before = list(runner._caches)
    pointers = [cache.unsafe_buffer_pointer() for cache in before]
    answer(core, prompts(2), SamplingParams(temperature=0.0, max_tokens=4))
    assert all(cache.is_deleted() for cache in before)
    assert [cache.unsafe_buffer_pointer() for cache in runner._caches] == pointers
    core.close()


def test_copied_blocks_hold_what_the_first_ones_do(model: Path) -> None:
    core = make_core(model, "tpu", **SMALL)
    runner: Any = core.runner
    answer(core, prompts(2), SamplingParams(temperature=0.0, max_tokens=4))
    held = np.array(runner._caches[0])
    assert np.abs(held[:, 1]).sum() > 0
    pairs = np.array([(1 + i % 2, 20 + i) for i in range(11)], np.int32)
    runner._copy(pairs)
    found = np.asarray(runner._caches[0])
    np.testing.assert_array_equal(found[:, pairs[:, 1]], held[:, pairs[:, 0]])


@pytest.mark.parametrize("family", every(2, ["llama", "gpt2"]))
def test_four_devices_give_the_same_tokens(family: str, tmp_path: Path) -> None:
    heads = {"num_key_value_heads": 4} if family == "llama" else {}
    path = make_checkpoint(family, tmp_path, **heads)
    wanted = answer(make_core(path, "reference"), prompts(6))
    core = make_core(path, "tpu", tensor_parallel_size=4, **SMALL)
    lowered = _watched_forward(core)
    found = answer(core, prompts(6))
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted]
    runner: Any = core.runner
    assert len(runner._caches[0].sharding.device_set) == 4
    assert runner._caches[0].addressable_shards[0].data.shape[3] == 1
    text = lowered[0].compile().as_text()
    assert len(re.findall(r"= \S+ all-reduce(?:-start)?\(", text)) == 2 * len(runner._caches)
    assert not re.findall(r"all-gather|all-to-all|collective-permute", text)


@thorough
def test_the_kernels_serve_a_model_on_two_devices(tmp_path: Path) -> None:
    path = make_checkpoint("gemma2", tmp_path)
    settings = {**SMALL, "tensor_parallel_size": 2, "attention_backend": "pallas"}
    core = make_core(path, "tpu", **settings)
    wanted = answer(make_core(path, "reference"), prompts(6))
    assert core.runner.describe()["attention"].startswith("pallas")
    assert [a.token_ids for a in answer(core, prompts(6))] == [a.token_ids for a in wanted]


def _watched_forward(core: EngineCore) -> list[Any]:
    """The lowered forward program of the first step that comes."""
    runner: Any = core.runner
    lowered: list[Any] = []
    forward = runner._programs.forward

    def watched(*args: Any) -> Any:
        if not lowered:
            lowered.append(forward.func.__wrapped__.lower(*forward.args, *args))
        return forward(*args)

    runner._programs.forward = watched
    return lowered


@thorough
def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path, dtype="bfloat16")
    cores = {
        (platform, dtype): make_core(path, platform, dtype=dtype, **SMALL)
        for platform, dtype in (("tpu", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float32"))
    }
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    asked = [[3 + (i * 7) % 200 for i in range(100)]]
    tables = {}
    for key, engine in cores.items():
        (one,) = answer(engine, asked, params)
        rows = [entry for u in one.updates for entry in u.prompt_logprobs or () if entry]
        tables[key] = np.array([entry.logprobs[0] for entry in rows])
    exact = tables["cpu", "float32"]
    mine = np.abs(tables["tpu", "bfloat16"] - exact).mean()
    theirs = np.abs(tables["cpu", "bfloat16"] - exact).mean()
    assert mine < 1.5 * theirs + 0.01


def test_weights_are_the_bits_of_the_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = make_checkpoint("llama", tmp_path, dtype="bfloat16")
    core = make_core(path, "tpu", dtype="bfloat16", **SMALL)
    runner: Any = core.runner
    table = np.asarray(runner._weights["embed"])
    with safe_open(path / "model.safetensors", "pt") as file:
        stored = file.get_tensor("model.embed_tokens.weight")
    assert table.dtype.name == "bfloat16"
    np.testing.assert_array_equal(table.view(np.int16), stored.view(dtype=_int16()).numpy())


def _int16() -> Any:
    import torch

    return torch.int16


def test_plans_are_of_one_device(model: Path, platform: Platform) -> None:
    plans = {}
    for size in (1, 8):
        core = make_core(model, "tpu", tensor_parallel_size=size, **SMALL)
        runner: Any = core.runner
        plans[size] = runner.plan()
        cache = sum(c.addressable_shards[0].data.nbytes for c in runner._caches)
        assert plans[size].bytes_per_block * 57 == cache
        held = sum(
            leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(runner._weights)
        )
        assert 0 <= plans[size].weight_bytes - held < 0.01 * held
    assert plans[8].bytes_per_block * 8 == plans[1].bytes_per_block


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tensor_parallel_size": 3}, UnsupportedError, "allowed for this model: 1, 2, 4, 8"),
        ({"tensor_parallel_size": 16}, ConfigError, "there are 8 devices"),
        ({"options": {"speed": 9}}, ConfigError, "no option 'speed'; it has: compilation_cache"),
        ({"kv_cache_dtype": "int8"}, UnsupportedError, "keeps"),
        ({"dtype": "float16"}, UnsupportedError, "computes in bfloat16, float32"),
        ({"speculative_config": {"method": "ngram"}}, UnsupportedError, "does not check drafts"),
    ],
)
def test_wrong_settings_are_explained(
    model: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_core(model, "tpu", **{**SMALL, **settings})
