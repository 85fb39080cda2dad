"""Attention of our own for TPU, written in Pallas."""

from dovetail_tpu.pallas.attention import PallasAttention

__all__ = ["PallasAttention"]
