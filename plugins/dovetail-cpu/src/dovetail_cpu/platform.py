"""The CPU platform: the shared torch runner with repacked linear layers."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor

from dovetail.core.batch import SamplingBatch
from dovetail.core.contracts.attention import AttentionBackend
from dovetail.core.contracts.ops import OpTable
from dovetail.core.contracts.platform import Capabilities, Memory
from dovetail.core.contracts.runner import Runner, RunnerConfig
from dovetail.core.machine import look_at_machine
from dovetail.platforms.torch.kept import KeptLayers
from dovetail.platforms.torch.loading import LoadedModel, RunnableModel
from dovetail.platforms.torch.ops import DenseLinear
from dovetail.platforms.torch.platform import BoundLinear, TorchPlatform
from dovetail.platforms.torch.sampling.rows import Rows, Which
from dovetail_cpu.attention import NativeAttention
from dovetail_cpu.choice import choose_rows
from dovetail_cpu.kept import KeptPanels, kept_folder, mapped_bytes, panel_file
from dovetail_cpu.kernels import Kernels, load_kernels, why_absent
from dovetail_cpu.linear import PackedLinear, PanelLinear, can_pack
from dovetail_cpu.memory import HugePages, keep_freed_memory
from dovetail_cpu.ops import override_ops
from dovetail_cpu.recorded import RecordedModel

__all__ = ["CpuPlatform"]

_log = logging.getLogger(__name__)
_OPENMP_DECIDES = (
    "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY",
)  # fmt: skip
"""Variables by which a user has OpenMP choose threads. One that binds them has bound this thread to
one core by now, which hides the others from it."""
_KEPT_FREE = 0.08
"""Share of all memory that is left to the rest of the machine."""
_SEVERAL_NODES = (
    "threads may run on {num_nodes} NUMA nodes, each of which reads the others' memory more slowly"
    " than its own; bind a server to one: numactl --cpunodebind=0 --membind=0 dovetail serve ..."
)


class CpuPlatform(TorchPlatform):
    """The host's processor. A step runs on return, for there is no other device to wait for."""

    name = "cpu"
    device = torch.device("cpu")
    attention_order = ("sdpa", "reference")
    capabilities = Capabilities(
        family="torch",
        dtypes=("bfloat16", "float32", "float16"),
        slow_dtypes=frozenset({"float16"}),
        kv_dtypes=("auto", "bfloat16", "float32", "float16", "int8", "fp8_e4m3", "fp8_e5m2"),
        block_sizes=(32, 16, 64, 128, 8, 4, 2, 1),
        features=frozenset(
            {
                "bad_words",
                "deterministic",
                "draft_model",
                "logits_processors",
                "prompt_logprobs",
                "quantization",
                "speculation",
                "structured_output",
                "transformers_models",
            }
        ),
        max_num_batched_tokens=2048,
        max_num_seqs=64,
    )

    def __init__(self) -> None:
        self._memory = HugePages()

    def device_names(self) -> list[str]:
        """The processor's name and the threads that compute."""
        return [f"{look_at_machine().processor}, {_default_threads()} threads"]

    def memory(self, device: int = 0) -> Memory:
        """The host's memory, or that of its control group."""
        machine = look_at_machine()
        total = machine.memory_limit or machine.memory_total
        needed = mapped_bytes() + int(_KEPT_FREE * total)
        return Memory(free=max(0, machine.memory_free - needed), total=total)

    def override_ops(self, table: OpTable) -> None:
        """The compiled kernels, where there are any; else a warning, once, that says why not."""
        kernels = load_kernels()
        if kernels is None:
            _warn(f"no compiled kernels, torch's slower ops are used: {why_absent()}")
        else:
            origin = f"dovetail-cpu {version('dovetail-cpu')} ({kernels.instruction_set})"
            override_ops(table, kernels, self._memory, origin)

    def attention_backends(self) -> list[AttentionBackend]:
        """That of the compiled kernels, then every installed one."""
        kernels, others = load_kernels(), super().attention_backends()
        return others if kernels is None else [NativeAttention(kernels), *others]

    def choose_rows(
        self, rows: Rows, which: Which, sampling: SamplingBatch
    ) -> tuple[Tensor, Tensor]:
        """By the compiled kernel, where there is one."""
        kernels = load_kernels()
        if kernels is None:
            return super().choose_rows(rows, which, sampling)
        return choose_rows(kernels, rows, which, sampling)

    def prepared(self, model: RunnableModel) -> RunnableModel:
        """With short steps of native models recorded, where there are kernels."""
        kernels = load_kernels()
        if kernels is None or not isinstance(model, LoadedModel):
            return model
        return RecordedModel(model, kernels)

    def bind_linear(self, weight: Tensor, bias: Tensor | None) -> BoundLinear:
        """Repack for the compiled kernels or for oneDNN; otherwise use the weight as it is."""
        return self.bind_rows([weight], bias)

    def bind_rows(self, weights: Sequence[Tensor], bias: Tensor | None) -> BoundLinear:
        """As ``bind_linear``; the kernels' panels are packed from the pieces."""
        kernels, first = load_kernels(), weights[0]
        if kernels is not None and _suits_panels(kernels, first):
            return PanelLinear(kernels, self._memory, weights, bias)
        weight = first if len(weights) == 1 else torch.cat(list(weights))
        if can_pack(weight):
            return PackedLinear(weight, bias)
        return DenseLinear(weight, bias)

    def kept_layers(self, config: RunnerConfig) -> KeptLayers | None:
        """Packed weights of checkpoints, on disk."""
        kernels, folder = load_kernels(), kept_folder()
        if kernels is None or folder is None or config.load_format == "dummy":
            return None
        return KeptPanels(panel_file(folder, config, kernels), kernels, self._memory)

    def runner(self, config: RunnerConfig) -> Runner:
        """The shared runner, after setting the number of threads (option ``threads``)."""
        config.check_options(self.name, "threads")
        threads = config.options.get("threads") or _default_threads()
        torch.set_num_threads(int(threads))
        if (num_nodes := look_at_machine().num_nodes) > 1:
            _warn(_SEVERAL_NODES.format(num_nodes=num_nodes))
        self._memory = HugePages()  # what another model reserved goes with it
        keep_freed_memory()
        return super().runner(config)


def _suits_panels(kernels: Kernels, weight: Tensor) -> bool:
    """Processors other than x86 may multiply bf16 in ways that only torch's libraries know."""
    is_known = kernels.instruction_set != "generic" or not can_pack(weight)
    return is_known and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0


@cache
def _warn(message: str) -> None:
    _log.warning(message)


def _default_threads() -> int:
    """What OpenMP was told, else one for each core that this process may use."""
    if not os.environ.keys().isdisjoint(_OPENMP_DECIDES):
        return torch.get_num_threads()
    return look_at_machine().num_threads
