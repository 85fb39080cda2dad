"""Ops in Triton, in place of the torch references.

Kernels are for one kind of device, and the platform decides once: a table with these ops is for
tensors on devices that Triton compiles for, all of them. Nothing is looked at per call and nothing
falls back to the reference; on another device Triton says that it cannot launch. A row of a result
is made of the same operations in the same order whatever other rows there are.

Importing this package is cheap: kernels, and Triton with them, are imported by ``override_ops``.
"""

from __future__ import annotations

from dovetail.core.contracts.ops import OpTable

__all__ = ["override_ops"]


def override_ops(table: OpTable, origin: str) -> None:
    """Enter the fused ops into the table.

    Args:
        table: Of a platform whose devices Triton compiles for.
        origin: Package and version of the platform.
    """
    from dovetail.platforms.gpu.ops import gates, norms, rotary

    for function in (
        norms.rms_norm,
        norms.add_rms_norm,
        norms.layer_norm,
        rotary.rotary,
        gates.silu_and_mul,
        gates.gelu_tanh_and_mul,
    ):
        table.override(function.__name__, function, origin=origin)
