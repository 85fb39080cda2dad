import dataclasses
from pathlib import Path

import pytest

from dovetail.core.config import EngineConfig, ModelFacts, fit_cache, resolve
from dovetail.core.contracts.platform import Adjustment, Capabilities
from dovetail.core.contracts.runner import CacheSpec
from dovetail.core.errors import (
    CheckpointError,
    ConfigError,
    OutOfMemoryError,
    PluginError,
    UnsupportedError,
)
from dovetail.core.request import SamplingParams

FACTS = ModelFacts(
    name="m",
    path=Path("/models/m"),
    tokenizer_path=Path("/models/m"),
    hf_config={},
    architectures=("LlamaForCausalLM",),
    dtype="bfloat16",
    vocab_size=100,
    max_model_len=1000,
    sliding_window=None,
    quantization=None,
    eos_token_ids=(2,),
    default_params=SamplingParams(),
    has_weights=True,
)
CAPABILITIES = Capabilities(
    family="torch",
    dtypes=("bfloat16", "float32"),
    kv_dtypes=("bfloat16", "float32"),
    block_sizes=(16, 32),
    features=frozenset({"transformers_models"}),
    max_num_batched_tokens=512,
    max_num_seqs=8,
)


class Machine:
    name = "toy"

    def __init__(self, changes=(), **capabilities):
        self.capabilities = dataclasses.replace(CAPABILITIES, **capabilities)
        self.changes = list(changes)

    def adjust(self, settings):
        assert settings["dtype"]
        return self.changes


def decide(machine=None, facts=None, native=True, allow_long=False, **wishes):
    return resolve(
        EngineConfig.from_kwargs(**wishes),
        dataclasses.replace(FACTS, **(facts or {})),
        machine or Machine(),
        native,
        known=("LlamaForCausalLM",),
        schemes=("int8", "gptq"),
        allow_long=allow_long,
    )


def test_defaults_come_from_checkpoint_and_platform():
    found = decide()
    assert (found.dtype, found.kv_dtype, found.block_size) == ("bfloat16", "bfloat16", 16)
    assert (found.max_model_len, found.max_num_seqs, found.max_num_batched_tokens) == (1000, 8, 512)
    assert found.served_model_names == ("m",)
    assert found.model_impl == "native"
    assert not found.async_scheduling
    assert found.reasons == {"dtype": "the checkpoint is bfloat16"}
    assert decide(Machine(async_steps=True)).async_scheduling
    assert not decide(Machine(async_steps=True), async_scheduling=False).async_scheduling


@pytest.mark.parametrize(
    ("stored", "wish", "dtype"),
    [
        ("float32", "auto", "float32"),
        ("float16", "auto", "bfloat16"),
        (None, "auto", "bfloat16"),
        ("bfloat16", "float", "float32"),
    ],
)
def test_dtype(stored, wish, dtype):
    assert decide(facts={"dtype": stored}, dtype=wish).dtype == dtype


def test_auto_leaves_what_is_slow():
    machine = Machine(dtypes=("bfloat16", "float16"), slow_dtypes=frozenset({"float16"}))
    found = decide(machine, facts={"dtype": "float16"})
    assert found.dtype == "bfloat16"
    assert found.reasons["dtype"] == (
        "the checkpoint is float16, platform toy is much faster in bfloat16"
    )
    assert decide(machine, facts={"dtype": "float16"}, dtype="half").dtype == "float16"


def test_kv_dtype_follows_the_activations_where_it_can():
    assert decide(Machine(kv_dtypes=("auto",))).kv_dtype == "bfloat16"
    found = decide(Machine(kv_dtypes=("float32",)))
    assert (found.kv_dtype, "kv_dtype" in found.reasons) == ("float32", True)


@pytest.mark.parametrize(
    ("error", "message", "wishes"),
    [
        (UnsupportedError, "dtype=float16: platform toy computes in", {"dtype": "half"}),
        (UnsupportedError, "block_size=8: platform toy has 16, 32", {"block_size": 8}),
        (
            UnsupportedError,
            "kv_cache_dtype=fp8_e4m3: platform toy keeps",
            {"kv_cache_dtype": "fp8"},
        ),
        (
            UnsupportedError,
            "quantization gptq: platform toy runs no quantized",
            {"quantization": "gptq"},
        ),
        (ConfigError, "max_model_len=1001: m is made for 1000", {"max_model_len": 1001}),
        (
            ConfigError,
            "max_num_batched_tokens=4 is below max_num_seqs=5",
            {"max_num_batched_tokens": 4, "max_num_seqs": 5},
        ),
        (
            ConfigError,
            "enable_chunked_prefill=False needs",
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 64},
        ),
    ],
)
def test_wishes_that_cannot_be_served(error, message, wishes):
    with pytest.raises(error, match=message) as caught:
        decide(**wishes)
    assert "\n" not in str(caught.value)


def test_a_longer_context_can_be_forced():
    found = decide(max_model_len=2000, allow_long=True)
    assert (found.max_model_len, found.max_model_len_is_given) == (2000, True)
    assert "max_model_len" in found.reasons


def test_sizes_left_open_follow_those_given():
    assert decide(max_num_batched_tokens=4).max_num_seqs == 4
    assert decide(max_num_seqs=600).max_num_batched_tokens == 600
    assert decide(enable_chunked_prefill=False).max_num_batched_tokens == 1000


def test_model_code():
    assert decide(native=False).model_impl == "transformers"
    assert decide(model_impl="transformers").model_impl == "transformers"
    narrow = Machine(features=frozenset())
    with pytest.raises(UnsupportedError, match="own architectures are LlamaForCausalLM"):
        decide(native=False, model_impl="native")
    with pytest.raises(UnsupportedError, match="platform toy cannot run LlamaForCausalLM"):
        decide(narrow, native=False)
    with pytest.raises(UnsupportedError, match="does not run the transformers library's models"):
        decide(narrow, model_impl="transformers")


def test_quantization():
    able = Machine(features=frozenset({"quantization"}))
    stored = {"quantization": "gptq"}
    found = decide(able, facts=stored)
    assert found.quantization == "gptq"
    assert found.reasons["quantization"] == "the checkpoint is stored so"
    assert decide(able, quantization="int8").quantization == "int8"
    with pytest.raises(ConfigError, match="quantization=awq: the checkpoint is quantized with g"):
        decide(able, facts=stored, quantization="awq")
    with pytest.raises(UnsupportedError, match="no quantized layers; choose a checkpoint without"):
        decide(facts=stored)
    with pytest.raises(UnsupportedError, match="there are gptq, int8; leave it out"):
        decide(able, quantization="int9")


def test_quantized_layers_are_not_deterministic():
    able = Machine(features=frozenset({"quantization", "deterministic"}))
    with pytest.raises(UnsupportedError, match="cannot be deterministic; leave it out"):
        decide(able, quantization="int8", deterministic=True)


def test_missing_weights():
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors files"):
        decide(facts={"has_weights": False})
    assert decide(facts={"has_weights": False}, load_format="dummy").load_format == "dummy"


def test_adjustments_of_the_platform_are_applied_with_reasons():
    change = Adjustment(field="block_size", value=32, reason="kernels read 32 at once")
    found = decide(Machine([change]))
    assert found.block_size == 32
    assert found.reasons["block_size"] == "kernels read 32 at once (platform toy)"
    with pytest.raises(PluginError, match="adjusts 'blok_size', which is no setting"):
        decide(Machine([Adjustment(field="blok_size", value=1, reason="")]))


def test_adjustments_are_checked_too():
    with pytest.raises(ConfigError, match="below max_num_seqs"):
        decide(Machine([Adjustment(field="max_num_seqs", value=10_000, reason="")]))


def test_runner_config():
    config = decide(threads=2, options={"numa": 1}, trust_remote_code=True).runner_config()
    assert config.options == {"numa": 1, "threads": 2}
    assert (config.model_path, config.max_model_len) == (Path("/models/m"), 1000)
    assert config.trust_remote_code


def plan(available, window=None, **wishes):
    wishes = {"max_num_seqs": 2, "gpu_memory_utilization": 1.0, **wishes}
    spec = CacheSpec(bytes_per_block=100, bytes_available=available, window=window)
    return fit_cache(decide(**wishes), spec)


def test_cache_takes_no_more_than_is_useful():
    assert plan(10**9).num_blocks == 2 * 63
    assert plan(10**9).reason == "2 requests of 1,000 tokens"


@pytest.mark.parametrize(
    ("wishes", "num_blocks"),
    [
        ({}, 100),
        ({"gpu_memory_utilization": 0.7}, 70),
        ({"kv_cache_memory_bytes": 6_400}, 64),
        ({"num_blocks": 1000}, 1000),
    ],
)
def test_cache_size(wishes, num_blocks):
    found = plan(10_000, **wishes)
    assert (found.num_blocks, found.max_model_len) == (num_blocks, 1000)


def test_a_window_in_every_layer_bounds_what_a_sequence_takes():
    wishes = {"window": 100, "max_num_batched_tokens": 60}
    # 160 positions are 10 blocks, and two are held in part; a whole sequence would take 63.
    assert plan(10**9, **wishes).num_blocks == 2 * 12
    assert plan(1_200, **wishes).max_model_len == 1000
    assert plan(1_100, **wishes).max_model_len == 11 * 16


def test_a_short_memory_shortens_the_context():
    found = plan(1_000)
    assert (found.num_blocks, found.max_model_len) == (10, 160)
    assert found.reason.startswith("160 tokens per sequence fit, of the model's 1,000")
    shrunk = decide().with_cache(found)
    assert shrunk.max_model_len == 160
    assert shrunk.reasons["max_model_len"] == found.reason


@pytest.mark.parametrize(
    ("available", "wishes", "needed"),
    [
        (1_000, {"max_model_len": 1000}, 6_300),
        (50, {}, 100),
        (-5, {}, 100),
        (1_000, {"kv_cache_memory_bytes": 2_000}, 2_000),
    ],
)
def test_too_little_memory_is_one_line_with_figures_and_flags(available, wishes, needed):
    with pytest.raises(OutOfMemoryError) as caught:
        plan(available, **wishes)
    message = str(caught.value)
    assert f"({needed} bytes" in message
    assert f"({max(available, 0)} bytes) are available" in message
    assert message.count("--") >= 3
    assert "\n" not in message


def test_several_devices_where_the_platform_shares_layers():
    with pytest.raises(UnsupportedError, match="tensor_parallel_size=2: platform toy runs a model"):
        decide(tensor_parallel_size=2)
    found = decide(Machine(features=frozenset({"tensor_parallel"})), tensor_parallel_size=2)
    assert found.runner_config().tensor_parallel_size == 2
    assert decide().runner_config().tensor_parallel_size == 1
