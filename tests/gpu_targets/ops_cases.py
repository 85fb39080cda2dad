"""The kernels of the fused ops and of the choice, with the arguments that they are launched with.

The ops are called with tensors that have no memory, and their kernels replaced by notes.
"""

from contextlib import ExitStack
from unittest.mock import patch

import torch

from dovetail.platforms.gpu.ops import choice, gates, norms, rotary
from dovetail.platforms.torch.sampling.weights import Controls
from tests.gpu_targets.targets import Case

KERNELS = [
    (norms, "_rms_norm"),
    (norms, "_add_rms_norm"),
    (norms, "_layer_norm"),
    (rotary, "_rotate"),
    (gates, "_activate"),
    (choice.kernels, "peaks"),
    (choice.kernels, "crown"),
    (choice.kernels, "plan"),
    (choice.kernels, "tally"),
    (choice.kernels, "enlist"),
    (choice, "settle"),
    (choice, "narrow"),
    (choice, "search"),
    (choice.kernels, "measure"),
    (choice.kernels, "draw"),
]
LIKE_OTHERS = [f"{name}.2" for name in ("plan", "settle", "narrow", "search", "measure")]
"""Left out: the choice of 16-bit logits, where it differs from the other by a constant only."""
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


def cases(target):
    """Llama's and Gemma's widths, a very long row, and the choice of a large vocabulary."""
    noted = {}
    with ExitStack() as stack:
        for module, name in KERNELS:
            kernel = getattr(module, name)
            stack.enter_context(patch.object(module, name, _Notes(kernel, noted)))
        _call_ops()
    return {name: case for name, case in noted.items() if name not in LIKE_OTHERS}


class _Notes:
    """In place of a kernel: its launches are written down."""

    def __init__(self, kernel, noted):
        self.kernel, self.noted, self.arg_names = kernel, noted, kernel.arg_names

    def __getitem__(self, grid):
        return self.note

    def note(self, *args, num_warps=4, **kwargs):
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        fixed = {p.name for p in self.kernel.params if p.is_constexpr}
        function = self.kernel.fn
        name, number = function.__name__.lstrip("_"), 1
        case = Case(
            kernel=f"{function.__module__}:{function.__name__}",
            signature={n: _type(v) for n, v in arguments.items() if n not in fixed},
            constants={n: v for n, v in arguments.items() if n in fixed},
            num_warps=num_warps,
        )
        while self.noted.get(f"{name}.{number}", case) != case:
            number += 1
        self.noted[f"{name}.{number}"] = case


def _type(value):
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _call_ops():
    def x(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    norms.rms_norm(x(8, 5120)[:, :4096].view(8, 32, 128), x(128), 1e-6)
    norms.rms_norm(x(8, 4096), x(4096), 1e-6)
    norms.add_rms_norm(x(8, 3584), x(8, 3584), x(3584, dtype=torch.float32), 1e-6)
    norms.add_rms_norm(x(8, 16384), x(8, 16384), x(16384), 1e-6)
    norms.rms_norm(x(8, 1 << 15), x(1 << 15), 1e-6)
    norms.layer_norm(x(8, 4096), x(4096), x(4096), 1e-5)
    rotary.rotary(x(8, 32, 128), x(8, 64, dtype=torch.float32), x(8, 64, dtype=torch.float32))
    rotary.rotary(x(8, 4, 80), x(8, 16, dtype=torch.float32), x(8, 16, dtype=torch.float32))
    gates.silu_and_mul(x(8, 28672))
    gates.gelu_tanh_and_mul(x(8, 28672))
    controls = Controls.unpack(x(5, 8, dtype=torch.float32))
    choice.choose(x(8, 151936, dtype=torch.float32), controls)
    choice.choose(x(8, 151936, dtype=torch.float32), None)
    choice.choose(x(8, 50257), controls)
    # So many rows that programs take several chunks each.
    of_many = Controls.unpack(x(5, 256, dtype=torch.float32))
    for restricts in (False, True):
        choice.choose(x(256, 50257), of_many, restricts=restricts)
