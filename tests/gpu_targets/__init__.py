"""Triton kernels compiled for GPUs that are not here, and what their compilers say of them."""
