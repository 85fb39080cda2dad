"""The roofline against sums by hand, and against published models of known size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.shapes import SHAPES
from dovetail.core.bench.named import WORKLOADS
from dovetail.core.bench.roofline import (
    ATTENTION,
    NORMS,
    LayerCost,
    Roofline,
    Span,
    StepCost,
    Work,
    step_cost,
)
from dovetail.core.contracts.platform import Rates
from dovetail.core.contracts.runner import RunnerConfig, RunnerPlan
from dovetail.core.errors import UnsupportedError
from dovetail.core.plugins.selection import load_platform

H200 = Rates(read_bytes_per_second=4.3e12, matrix_flops_per_second=790e12)
"""Measured copy and bf16 products."""

LLAMA_8B, QWEN3_8B, QWEN3_06B = (
    SHAPES[name] for name in ("llama-3.1-8b", "qwen3-8b", "qwen3-0.6b")
)


def runner_config(hf_config, **changes):
    settings = {
        "model_path": Path(),
        "hf_config": hf_config,
        "model_impl": "native",
        "load_format": "dummy",
        "dtype": "bfloat16",
        "kv_dtype": "bfloat16",
        "block_size": 16,
        "max_model_len": 2048,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
    }
    return RunnerConfig(**{**settings, **changes})


def cost_of(hf_config, **changes):
    config = runner_config(hf_config, **changes)
    return step_cost(config, load_platform("reference").runner(config).plan())


@pytest.mark.parametrize(
    ("hf_config", "gigabytes", "step_ms", "kv_bytes"),
    [(LLAMA_8B, 15.01, 3.49, 131_072), (QWEN3_06B, 1.19, 0.28, 114_688)],
)
def test_a_step_of_models_of_known_size(hf_config, gigabytes, step_ms, kv_bytes):
    cost = cost_of(hf_config)
    assert cost.weight_bytes / 1e9 == pytest.approx(gigabytes, rel=0.03)
    assert sum(span.kv_bytes for span in cost.spans) == kv_bytes
    bound = Roofline(cost=cost, rates=H200)
    assert bound.decode([1]) * 1000 == pytest.approx(step_ms, rel=0.03)


def test_workloads_of_models_of_known_size():
    def bound(hf_config, name):
        samples = WORKLOADS[name].draw.samples(256, hf_config["vocab_size"], 0)
        lengths = [(sample.prompt_len, sample.output_len) for sample in samples]
        return Roofline(cost=cost_of(hf_config), rates=H200).workload(lengths)

    assert bound(QWEN3_06B, "nano") == pytest.approx(3.68, rel=0.03)
    assert bound(QWEN3_8B, "1024/1024") == pytest.approx(22.1, rel=0.03)


def test_decode_at_batch_256_is_bound_by_keys_and_values():
    bound = Roofline(cost=cost_of(LLAMA_8B), rates=H200)
    assert bound.decode([1024] * 256) * 1000 == pytest.approx(11.5, rel=0.03)


SMALL = StepCost(
    weight_bytes=1000,
    layer_flops=10,
    head_flops=5,
    spans=(Span(window=None, kv_bytes=4, flops=3), Span(window=8, kv_bytes=2, flops=1)),
)


def test_a_step_by_hand():
    slow_memory = Roofline(
        cost=SMALL, rates=Rates(read_bytes_per_second=10, matrix_flops_per_second=1e9)
    )
    assert slow_memory.decode([20, 5]) == (1000 + 25 * 4 + (8 + 5) * 2) / 10
    slow_products = Roofline(
        cost=SMALL, rates=Rates(read_bytes_per_second=1e9, matrix_flops_per_second=10)
    )
    assert slow_products.decode([20, 5]) == (2 * 15 + 25 * 3 + 13 * 1) / 10


def test_a_prompt_by_hand():
    slow_products = Roofline(
        cost=SMALL, rates=Rates(read_bytes_per_second=1e9, matrix_flops_per_second=10)
    )
    pairs = sum(range(1, 13)), sum(min(query, 8) for query in range(1, 13))
    assert slow_products.prefill([12]) == (12 * 10 + 5 + pairs[0] * 3 + pairs[1]) / 10
    slow_memory = Roofline(
        cost=SMALL, rates=Rates(read_bytes_per_second=10, matrix_flops_per_second=1e9)
    )
    assert slow_memory.prefill([12, 12]) == 100


def test_a_workload_is_its_prompts_and_every_step_after():
    bound = Roofline(cost=SMALL, rates=Rates(read_bytes_per_second=7, matrix_flops_per_second=11))
    want = bound.prefill([5, 9]) + bound.decode([6, 10]) + bound.decode([11])
    assert bound.workload([(5, 2), (9, 3)]) == pytest.approx(want)
    assert bound.workload([(5, 1)]) == bound.prefill([5])


def test_windows_share_the_plan_s_bytes():
    gemma = {
        "architectures": ["Gemma2ForCausalLM"],
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "query_pre_attn_scalar": 24,
        "sliding_window": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    spans = {span.window: span for span in cost_of(gemma, max_model_len=512).spans}
    assert set(spans) == {None, 32}
    assert spans[None].kv_bytes == spans[32].kv_bytes == 2 * 2 * 2 * 16 * 2
    assert spans[None].flops == 4 * 2 * 4 * 16


def test_a_quantized_model_reads_less():
    whole, less = cost_of(LLAMA_8B), cost_of(LLAMA_8B, quantization="int8")
    assert 0.5 < less.weight_bytes / whole.weight_bytes < 0.6
    assert less.layer_flops == whole.layer_flops


def test_devices_share_a_step():
    plan = RunnerPlan(
        weight_bytes=8 << 30, step_bytes=0, bytes_per_block=16 * 65_536, window=None, choices={}
    )
    half = step_cost(runner_config(LLAMA_8B, tensor_parallel_size=2), plan)
    whole = cost_of(LLAMA_8B)
    assert half.layer_flops * 2 == whole.layer_flops
    assert sum(s.flops for s in half.spans) * 2 == sum(s.flops for s in whole.spans)


def test_no_bound_where_nothing_simple_can_be_said():
    nothing = RunnerPlan(weight_bytes=0, step_bytes=0, bytes_per_block=16, window=None, choices={})
    with pytest.raises(UnsupportedError, match="check drafts"):
        step_cost(runner_config(LLAMA_8B, max_drafts=3), nothing)
    with pytest.raises(UnsupportedError, match="counts 0 bytes of weights"):
        step_cost(runner_config(LLAMA_8B), nothing)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("hf_config", [LLAMA_8B, QWEN3_06B], ids=["llama", "tied"])
def test_layers_by_name_add_up(hf_config, quantization):
    cost = cost_of(hf_config, quantization=quantization)
    assert [layer.name for layer in cost.layers if layer.name != NORMS] == [
        "qkv", "out", "gate_up", "down", "lm_head"
    ]  # fmt: skip
    assert sum(layer.weight_bytes for layer in cost.layers) == cost.weight_bytes
    rates = Rates(read_bytes_per_second=3e9, matrix_flops_per_second=5e12)
    for contexts in ([700], [20, 5, 900] * 50):
        ones, lens = np.ones(len(contexts), np.int32), np.array(contexts, np.int32)
        parts = cost.work(ones, lens, len(contexts)).values()
        whole = sum(parts, Work()).seconds(rates)
        assert whole == pytest.approx(Roofline(cost=cost, rates=rates).decode(contexts))


def test_work_of_a_step_by_hand():
    layers = (
        LayerCost(name="a", weight_bytes=900, flops=10),
        LayerCost(name="b", weight_bytes=100, flops=5, is_head=True),
    )
    found = replace(SMALL, layers=layers).work(np.array([3, 1]), np.array([3, 20]), 1)
    assert found["a"] == Work(num_bytes=900, flops=4 * 10)
    assert found["b"] == Work(num_bytes=100, flops=5)
    pairs, windowed = (1 + 2 + 3) + 20, (1 + 2 + 3) + 8
    read = (3 + 20) * 4 + (3 + 8) * 2
    assert found[ATTENTION] == Work(num_bytes=read, flops=pairs * 3 + windowed)


@pytest.mark.parametrize(("query", "context", "read"), [(1, 20, 8), (4, 20, 11), (4, 6, 6)])
def test_what_a_window_reads(query, context, read):
    assert SMALL.spans[1].read(query, context) == read
    assert SMALL.spans[0].read(query, context) == context
