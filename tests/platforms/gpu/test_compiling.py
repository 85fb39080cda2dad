"""Launches that only compile: nothing is computed, and no variant is compiled twice."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dovetail.core.contracts.launches import launcher
from dovetail.platforms.gpu.compiling import only_compiling

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Parameter:
    """As Triton describes one."""

    name: str
    is_constexpr: bool = False
    do_not_specialize: bool = False
    do_not_specialize_on_alignment: bool = False


class Kernel:
    """Takes down what is done with it."""

    params = (
        Parameter("x"),
        Parameter("part", do_not_specialize_on_alignment=True),
        Parameter("step"),
        Parameter("count", do_not_specialize=True),
        Parameter("SIZE", is_constexpr=True),
    )
    arg_names = tuple(parameter.name for parameter in params)

    def __init__(self, error: Exception | None = None) -> None:
        self.launched: list[Any] = []
        self.compiled: list[dict[str, Any]] = []
        self.threads: set[str] = set()
        self.error = error

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launched.append(grid)

    def warmup(self, *args: Any, grid: tuple[int, ...], **options: Any) -> None:
        self.threads.add(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        self.compiled.append(dict(zip(self.arg_names, args, strict=False)) | options)


NUMBERS = torch.zeros(64, dtype=torch.float32)


def launch(kernel: Kernel, **changes: Any) -> None:
    """A launch that differs in what is said."""
    given = SimpleNamespace(x=NUMBERS, part=NUMBERS, step=32, count=5, SIZE=8, num_warps=4)
    vars(given).update(changes)
    x, part, step, count = given.x, given.part, given.step, given.count
    launcher(kernel, (3,))(x, part, step, count, SIZE=given.SIZE, num_warps=given.num_warps)


def test_elsewhere_launches_launch() -> None:
    kernel = Kernel()
    launch(kernel)
    with only_compiling(CPU):
        other = threading.Thread(target=launch, args=(kernel,))
        other.start()
        other.join()
    assert kernel.launched == [(3,), (3,)] and not kernel.compiled


ALIKE: list[dict[str, Any]] = [
    {},
    {"step": 64},
    {"count": 1},
    {"count": 16},
    {"x": NUMBERS[4:]},
    {"part": NUMBERS[1:]},
]
DIFFERENT: list[dict[str, Any]] = [
    {"step": 1},
    {"step": 3},
    {"x": NUMBERS[1:]},
    {"x": NUMBERS.half()},
    {"x": None},
    {"SIZE": 16},
    {"num_warps": 8},
]


def test_a_variant_is_compiled_once() -> None:
    kernel = Kernel()
    with only_compiling(CPU):
        for changes in ALIKE:
            launch(kernel, **changes)
    assert len(kernel.compiled) == 1 and not kernel.launched
    assert all(name.startswith("compiler") for name in kernel.threads)


@pytest.mark.parametrize("changes", DIFFERENT, ids=str)
def test_what_differs_is_compiled(changes: dict[str, Any]) -> None:
    kernel = Kernel()
    with only_compiling(CPU):
        launch(kernel)
        launch(kernel, **changes)
    assert len(kernel.compiled) == 2


def test_the_rest_is_compiled_where_one_fails() -> None:
    bad, good = Kernel(ValueError("no such instruction")), Kernel()
    with pytest.raises(ValueError, match="no such instruction"), only_compiling(CPU):
        launch(bad)
        launch(good)
    assert len(good.compiled) == 1
    launch(good)
    assert good.launched, "the context has ended"
