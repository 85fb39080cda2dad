"""The TPU platform: JAX's devices, real or simulated on the CPU."""

from __future__ import annotations

import logging
import math
import os
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dovetail.core.contracts.attention import AttentionBackend
from dovetail.core.contracts.ops import Op, OpTable
from dovetail.core.contracts.platform import Capabilities, Memory, Platform
from dovetail.core.contracts.runner import Runner, RunnerConfig
from dovetail.core.contracts.workbench import Activity, Workbench
from dovetail.core.errors import ConfigError, PluginError
from dovetail.core.plugins.attention import installed_backends
from dovetail.core.types import Array
from dovetail_tpu import SIMULATE, describe
from dovetail_tpu.ops import DenseLinear, references
from dovetail_tpu.transfers import Meter

__all__ = ["TpuPlatform"]

_CACHE = "compilation_cache"


class TpuPlatform(Platform):
    """Steps are programs compiled by XLA for a few shapes; dispatched, not waited for.

    Args:
        num_simulated: So many devices are the host's processor; None: they are real.

    Raises:
        PluginError: JAX runs with fewer devices or others.
    """

    name = "tpu"
    capabilities = Capabilities(
        family="jax",
        dtypes=("bfloat16", "float32"),
        kv_dtypes=("auto",),
        block_sizes=(32, 16, 64, 128, 8),
        features=frozenset({"prompt_logprobs", "structured_output", "tensor_parallel"}),
        static_shapes=True,
        async_steps=True,
        max_num_batched_tokens=1024,
        max_num_seqs=64,
    )

    def __init__(self, num_simulated: int | None) -> None:
        self.simulated = num_simulated is not None
        self.meter = Meter()
        jax.monitoring.register_event_duration_secs_listener(self.meter.compiled)
        self.devices = _devices(num_simulated)
        if self.simulated:
            logging.getLogger(__name__).warning("the TPU is %s", describe(len(self.devices)))

    def device_names(self) -> list[str]:
        """The kind of each chip, or that it is none."""
        if self.simulated:
            return [f"TPU {i}, simulated on the CPU" for i in range(len(self.devices))]
        return [f"{device.device_kind} {device.id}" for device in self.devices]

    def memory(self, device: int = 0) -> Memory:
        """What JAX says of the chip; a simulated one has its share of half the host's memory."""
        if not self.simulated:
            stats = self.devices[device].memory_stats() or {}
            limit = int(stats["bytes_limit"])
            return Memory(free=limit - int(stats["bytes_in_use"]), total=limit)
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (2 * len(self.devices))
        return Memory(free=max(0, total - _held(self.devices[device])), total=total)

    def attention_backends(self) -> list[AttentionBackend]:
        """Kernels first on a chip; simulated, where they are interpreted, plain XLA first.

        The backends of JAX's arrays are made with whether kernels must be interpreted.
        """
        order = ("xla", "pallas") if self.simulated else ("pallas", "xla")
        return installed_backends(self.capabilities.family, self.simulated, order)

    def runner(self, config: RunnerConfig) -> Runner:
        """A runner; option ``compilation_cache`` is a folder for compiled programs, or "off"."""
        from dovetail_tpu.runner import JaxRunner

        config.check_options(self.name, _CACHE)
        if config.tensor_parallel_size > len(self.devices):
            more = f"; {SIMULATE} says how many are simulated" if self.simulated else ""
            raise ConfigError(
                f"tensor_parallel_size={config.tensor_parallel_size}: there are"
                f" {len(self.devices)} devices{more}."
            )
        _keep_programs(config.options.get(_CACHE))
        return JaxRunner(self, config)

    def workbench(self) -> Workbench:
        """Ops and arrays of the first device."""
        return _Workbench(self)

    def watch(self) -> AbstractContextManager[Activity]:
        """Count programs, compilations, and the copies that the runner and the workbench make."""
        return self.meter.watch()

    def synchronize(self) -> None:
        """Wait until every device has done what it was given."""
        for device in self.devices:
            jax.device_put(np.zeros((), np.int32), device).block_until_ready()


class _Workbench:
    """See ``core/contracts/workbench.py``."""

    def __init__(self, platform: TpuPlatform) -> None:
        put = partial(jax.device_put, device=platform.devices[0])
        self._put, self.get = platform.meter.counted("put", put), platform.meter.fetch
        self.ops: Any = OpTable(references()).bind()
        self.overrides: dict[str, Op] = {}

    def put(self, array: np.ndarray[Any, Any]) -> Array:
        with jax.enable_x64(True):
            return self._put(array)

    bind_linear = staticmethod(DenseLinear)

    def num_bytes(self, array: Array) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(array))


def _devices(num_simulated: int | None) -> list[jax.Device]:
    """Of the chips, or that many of the host's processor. JAX decides when it is first used."""
    kind, count = ("tpu", 1) if num_simulated is None else ("cpu", num_simulated)
    if num_simulated is not None:
        with suppress(RuntimeError):  # JAX runs already: whether as it must is seen below.
            _configure(jax_platforms=kind, jax_num_cpu_devices=count)
    devices = jax.devices()
    if devices[0].platform != kind or len(devices) < count:
        raise PluginError(
            f"JAX runs with {len(devices)} devices of {devices[0].platform}, not {count} of {kind};"
            f" set JAX_PLATFORMS={kind}, and JAX_NUM_CPU_DEVICES if that is cpu, before it is used."
        )
    return devices[:num_simulated]


def _held(device: jax.Device) -> int:
    """Bytes of the arrays that are on a device."""
    live = jax.live_arrays()  # type: ignore[no-untyped-call]
    arrays = [array for array in live if device in array.sharding.device_set]
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


def _keep_programs(folder: object) -> None:
    """Look for compiled programs in a folder, if none is named the user's, and leave them there."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    _configure(
        jax_enable_compilation_cache=folder != "off",
        jax_compilation_cache_dir=str(folder or Path(home) / "dovetail" / "xla"),
        jax_persistent_cache_min_compile_time_secs=0.0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    )


def _configure(**settings: Any) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]
