"""Triton as the kernels name it. It has no types of its own: here it gets them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["PLAN_ARGUMENTS", "jit", "kernel", "tl"]

triton: Any = import_module("triton")
tl: Any = import_module("triton.language")

PLAN_ARGUMENTS = ("starts_ptr", "lens_ptr", "slots_ptr", "meta_ptr", "tables_ptr")
"""Arguments that are parts of one array: where they begin must not lead to another variant."""


def jit(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return triton.jit(function)


def kernel(function: Callable[..., None]) -> Any:
    """A function that is launched."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    parts = [name for name in PLAN_ARGUMENTS if name in names]
    sizes = [name for name in ("num_rows",) if name in names]
    return triton.jit(
        function, do_not_specialize_on_alignment=[*parts, *sizes], do_not_specialize=sizes
    )
