"""Triton decides once per process whether kernels are interpreted: ``make test-triton`` says so."""

import os

import pytest
import torch

if "TRITON_INTERPRET" not in os.environ:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU where kernels are interpreted."""
    if os.environ["TRITON_INTERPRET"] == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.fail("TRITON_INTERPRET is not 1, and there is no GPU: nothing can run the kernels")
    return torch.device("cuda", torch.cuda.current_device())
