"""The library's model with the checkpoint's weights, bound for the platform.

The library renames, splits and fuses a checkpoint's tensors, ties what is tied and computes the
buffers that are not stored. It maps the files, so that nothing is copied but what it changes or
what the platform repacks. Its mappings are private copies on write, as its initialisation may
write to tensors that it has loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.errors import CheckpointError
from dovetail.core.models.weights import open_checkpoint
from dovetail.platforms.torch.dtypes import torch_dtype
from dovetail.platforms.torch.platform import TorchPlatform

__all__ = ["bind_weights", "read_model"]

_SHOWN = 10


def read_model(
    model_class: Any, library_config: Any, config: RunnerConfig, attention: str
) -> tuple[Any, int]:
    """Make the model and give it its weights, on the CPU.

    Args:
        model_class: The library's class.
        library_config: The library's config.
        config: The folder, the dtype, and whether weights are read or made up.
        attention: The attention implementation to make it with.

    Returns:
        The model and the bytes of its checkpoint.

    Raises:
        CheckpointError: Tensors are missing, not known or of a wrong shape; names them.
    """
    dtype = torch_dtype(config.dtype)
    if config.load_format == "dummy":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = model_class._from_config(
                library_config, dtype=dtype, attn_implementation=attention
            )
        return model.eval(), sum(tensor.nbytes for tensor in model.parameters())
    checkpoint = open_checkpoint(config.model_path)
    try:
        with _quiet():
            model, report = model_class.from_pretrained(
                config.model_path,
                config=library_config,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot read the checkpoint into"
            f" {model_class.__name__}: {str(error).splitlines()[0]:.200}"
        ) from error
    _check(report)
    return model, checkpoint.total_bytes


def bind_weights(
    model: nn.Module, platform: TorchPlatform, total_bytes: int
) -> Generator[tuple[int, int], None, None]:
    """Move every tensor to the device and hand the linear layers to the platform.

    A linear layer keeps an empty weight of the same shape and dtype, for code that looks at them.

    Args:
        model: On the CPU. Changed in place.
        platform: Repacks the linear layers.
        total_bytes: Of the checkpoint.
    """
    done = 0
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    shared: dict[int, nn.Parameter] = {}

    def moved(parameter: nn.Parameter) -> nn.Parameter:
        """The parameter on the device, one for all modules that share it."""
        if id(parameter) in shared:
            return shared[id(parameter)]
        there = nn.Parameter(parameter.detach().to(platform.device), requires_grad=False)
        if uses[id(parameter)] > 1:
            shared[id(parameter)] = there
        return there

    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            done += 0 if id(parameter) in shared else parameter.nbytes
            module._parameters[name] = moved(parameter)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(platform.device)
        _bind_linear(module, platform)
        yield min(done, total_bytes), total_bytes
    yield total_bytes, total_bytes


def _bind_linear(module: Any, platform: TorchPlatform) -> None:
    """Let the platform compute a linear layer, whichever of the library's kinds it is."""
    if type(module) is nn.Linear or type(module).__name__ == "FalconLinear":
        weight: Tensor = module.weight
    elif isinstance(module, Conv1D):
        weight = module.weight.T
    else:
        return
    bias = module.bias
    module.forward = platform.bind_linear(weight.data, None if bias is None else bias.data)
    empty = torch.empty_like(module.weight, device="meta")
    module.weight = nn.Parameter(empty, requires_grad=False)


def _check(report: Mapping[str, Any]) -> None:
    """Raise what the library found wrong with the tensors."""
    mismatched = [
        f"{name} {tuple(held)} instead of {tuple(wanted)}"
        for name, held, wanted in report["mismatched_keys"]
    ]
    problems = {
        "lacks": sorted(report["missing_keys"]),
        "has, unknown to the model,": sorted(report["unexpected_keys"]),
        "has, of a wrong shape,": sorted(mismatched),
    }
    lines = [f"It {what} {_listed(names)}." for what, names in problems.items() if names]
    if lines:
        raise CheckpointError(
            "The checkpoint does not fit its config.json. " + " ".join(lines) + " Is config.json "
            "the one that came with the weights?"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {noun}: {', '.join(names[:_SHOWN])}{more}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither the library's progress bar nor its report: ours take their place."""
    logging: Any = transformers.logging
    level, shows = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows:
            logging.enable_progress_bar()
