"""Triton decides once per process whether kernels are interpreted: ``make test-triton`` says so."""

import os

if "TRITON_INTERPRET" not in os.environ:
    collect_ignore_glob = ["*"]
