"""Compiled for TPUs that are not there, by the compiler that they have; nothing is run.

Wants libtpu: ``TPU_LIBRARY_PATH=.../libtpu.so pytest plugins/dovetail-tpu/tests/test_aot.py -s``
prints what docs/measurements/tpu.md shows.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dovetail_tpu.pallas import PallasAttention
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dovetail.core.batch import Batch, SamplingBatch
from dovetail.core.buckets import StepShape
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.contracts.model import Constant, Linear
from dovetail.core.models.weights import fill, leaves

pytestmark = pytest.mark.skipif(
    "TPU_LIBRARY_PATH" not in os.environ,
    reason="TPU_LIBRARY_PATH does not name a libtpu.so: `pip install --no-deps libtpu` has one",
)

GENERATIONS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}
VMEM = {"v5e": 128 << 20, "v6e": 128 << 20, "v5p": 64 << 20, "tpu7x": 64 << 20}
"""Bytes of vector memory of a core."""
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 2,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
"""Llama 3 8B, of whose 32 layers, all alike, there are two."""
DECODE, PREFILL = StepShape(64, 64, 0), StepShape(512, 64, 0)
CONTEXT, NUM_BLOCKS = 4096, 1024
MIB = 1 << 20


@functools.cache
def devices(generation: str) -> tuple[Any, ...]:
    """Of a host that is only described."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        name = GENERATIONS[generation]
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def mesh_of(generation: str, size: int) -> Mesh:
    return Mesh(np.array(devices(generation)[:size]), ("tp",))


def described(mesh: Mesh, tree: Any, axis: int | None = None) -> Any:
    """Arrays of those shapes and dtypes on the mesh, of which there is only the description."""
    spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "tp")
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def batch_of(shape: StepShape, block_size: int) -> Batch:
    """Padding in that shape: what is compiled depends on nothing else."""
    rows, none = np.zeros(shape.num_rows, np.int32), np.zeros(0, np.intp)
    return Batch(
        step=0,
        rows=rows.astype(np.intp),
        query_lens=rows,
        context_lens=rows,
        block_tables=np.zeros((shape.num_rows, CONTEXT // block_size), np.int32),
        token_ids=np.zeros(shape.num_tokens, np.int32),
        carried=none,
        carried_rows=none,
        sampled=none,
        sampling=SamplingBatch.greedy(0),
        copies=np.zeros((0, 2), np.int32),
        num_padding=shape.num_tokens,
    )


def vmem_used(text: str) -> int:
    """The highest byte of vector memory that a kernel takes; XLA may keep arrays below it."""
    kernels = [line for line in text.splitlines() if '"tpu_custom_call"' in line]
    used = [
        int(size)
        for line in kernels
        for size in re.findall(r'"used_scoped_memory_configs":\[\{.*?"size":"(\d+)"', line)
    ]
    return max(used)


ROWS: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """What was compiled, printed at the end."""
    ROWS[:] = [
        "| TPU | program | compile s | temporary MiB | VMEM MiB | GFLOP outside kernels |",
        "|---|---|--:|--:|--:|--:|",
    ]
    yield
    print("", *ROWS, sep="\n")


def compile_for(generation: str, name: str, lowered: Any, cache_bytes: int, most_vmem: int) -> str:
    """Compile, look at memory, and give the compiled text."""
    start = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - start
    memory, text = program.memory_analysis(), program.as_text()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes
    vmem, flops = vmem_used(text), program.cost_analysis()["flops"]
    assert vmem <= most_vmem
    ROWS.append(
        f"| {generation} | {name} | {seconds:.1f} | {memory.temp_size_in_bytes / MIB:.1f} "
        f"| {vmem / MIB:.1f} | {flops / 1e9:.1f} |"
    )
    return str(text)


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_kernels(generation: str, shape: StepShape, dtype: str, block_size: int) -> None:
    """The heads of Llama 3 8B: 64 rows of up to 4096 tokens, or 512 tokens in 64 rows."""
    check_kernels(generation, shape, dtype, block_size, AttentionSpec(
        layer=0, num_heads=32, num_kv_heads=8, head_size=128, scale=128**-0.5
    ))  # fmt: skip


SPECS = {
    "heads 8/1/128 (one of 8 devices)": (8, 1, 128),
    "heads 32/8/64 (Llama 3.2 1B)": (32, 8, 64),
    "heads 32/32/80 (Phi 2)": (32, 32, 80),
    "heads 32/32/128 (Llama 2 7B)": (32, 32, 128),
    "heads 16/8/256 (Gemma 2 9B)": (16, 8, 256),
}


@pytest.mark.parametrize("shape", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("generation", ["v5e", "tpu7x"])
def test_kernels_for_other_heads(generation: str, name: str, shape: StepShape) -> None:
    heads, kv_heads, size = SPECS[name]
    capped: Any = {"soft_cap": 50.0, "window": 2048} if size == 256 else {}
    spec = AttentionSpec(
        layer=0, num_heads=heads, num_kv_heads=kv_heads, head_size=size, scale=size**-0.5, **capped
    )
    check_kernels(generation, shape, "bfloat16", 32, spec, f", {name}")


def check_kernels(
    generation: str, shape: StepShape, dtype: str, block_size: int, spec: AttentionSpec,
    suffix: str = "",
) -> None:  # fmt: skip
    backend = PallasAttention(interpret=False)
    need = AttentionNeed(specs=(spec,), dtype=dtype, kv_dtype=dtype, block_size=block_size)
    assert backend.refuses(need) is None
    cache = jax.eval_shape(lambda: backend.allocate(spec, need, NUM_BLOCKS))
    q, k = (
        jax.ShapeDtypeStruct((shape.num_tokens, heads, spec.head_size), jnp.dtype(dtype))
        for heads in (spec.num_heads, spec.num_kv_heads)
    )
    plan = backend.plan(batch_of(shape, block_size), need)
    inputs = described(mesh_of(generation, 1), (q, k, k, cache, plan))
    attend = jax.jit(functools.partial(backend.attend, spec=spec), donate_argnums=3)
    kind = "decode" if shape.is_decode else "prefill"
    name = f"{kind} {shape.num_tokens}, {dtype}, blocks of {block_size}{suffix}"
    num_bytes = NUM_BLOCKS * backend.bytes_per_block(spec, need)
    text = compile_for(generation, name, attend.lower(*inputs), num_bytes, VMEM[generation] // 4)
    assert text.count('custom_call_target="tpu_custom_call"') == (2 if shape.is_decode else 3)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_blocks_are_copied_in_place(generation: str) -> None:
    cache = jax.ShapeDtypeStruct((NUM_BLOCKS, 8, 64, 256), jnp.bfloat16)
    pairs = jax.ShapeDtypeStruct((8, 2), jnp.int32)
    inputs = described(mesh_of(generation, 1), ([cache, cache], pairs))
    copy = jax.jit(PallasAttention(interpret=False).copy_blocks, donate_argnums=0)
    memory = copy.lower(*inputs).compile().memory_analysis()
    num_bytes = 2 * NUM_BLOCKS * 8 * 64 * 256 * 2
    assert memory.alias_size_in_bytes == num_bytes
    assert memory.temp_size_in_bytes < num_bytes // 16


@pytest.mark.parametrize("shape", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_llama(generation: str, size: int, shape: StepShape) -> None:
    """The runner's own program, on one device and on four that share every layer."""
    from dovetail_tpu import programs
    from dovetail_tpu.transfers import Meter, pack

    from dovetail.core.models.llama import Llama
    from dovetail.core.models.split import share_of_attention

    backend, mesh = PallasAttention(interpret=False), mesh_of(generation, size)
    model = Llama.from_config(LLAMA, max_model_len=CONTEXT)
    need = AttentionNeed(
        specs=tuple(share_of_attention(spec, 0, size) for spec in model.attention_specs()),
        dtype="bfloat16",
        kv_dtype="bfloat16",
        block_size=64,
    )
    weights = weights_of(model, mesh)
    whole = model.attention_specs()[0]
    cache = jax.eval_shape(lambda: backend.allocate(whole, need, NUM_BLOCKS))
    caches = [described(mesh, cache, backend.heads_axis)] * len(need.specs)
    tokens, index = np.zeros(shape.num_tokens, np.int32), np.zeros(shape.num_rows, np.int32)
    plan = backend.plan(batch_of(shape, need.block_size), need)
    rest = (index, pack((tokens, tokens, tokens, index, plan)))
    forward = programs.Programs(model, weights, backend, need, mesh, Meter()).forward
    program: Any = forward.func
    lowered = program.__wrapped__.lower(weights, caches, *described(mesh, rest))
    num_bytes = NUM_BLOCKS * sum(backend.bytes_per_block(spec, need) for spec in need.specs)
    name = f"Llama, {'decode' if shape.is_decode else 'prefill'} {shape.num_tokens}, {size} devices"
    text = compile_for(generation, name, lowered, num_bytes, VMEM[generation])
    sums = len(re.findall(r" all-reduce(?:-start)?\(", text))
    assert sums == (0 if size == 1 else 2 * len(need.specs))


def weights_of(model: Any, mesh: Mesh) -> Any:
    """Descriptions of the parameters where the runner would put them."""
    from dovetail_tpu.ops import DenseLinear

    from dovetail.core.models.split import split_axis

    def bound(leaf: Any) -> Any:
        if isinstance(leaf, Constant):
            return described(mesh, leaf.make())
        is_linear = isinstance(leaf, Linear)
        shape = (sum(leaf.out_features), leaf.in_features) if is_linear else leaf.shape
        array = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        array = described(mesh, array, split_axis(leaf))
        return DenseLinear(array) if is_linear else array

    tree = model.weights()
    return fill(tree, {path: bound(leaf) for path, leaf in leaves(tree)})
