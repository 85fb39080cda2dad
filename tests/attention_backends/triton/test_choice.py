"""When the backend serves, and when it says why not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dovetail.attention_backends.triton import tuning
from dovetail.attention_backends.triton.backend import TritonAttention
from dovetail.attention_backends.triton.layer import Layer
from dovetail.attention_backends.triton.plan import Plan
from dovetail.attention_backends.triton.target import Target
from dovetail.attention_backends.triton.tuning import HEAD_SIZES, KINDS, Tuning
from tests.attention_backends.sequences import make_need, make_spec

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("spec", "need", "said"),
    [
        ({"size": 257}, {}, "257"),
        ({"heads": 258, "kv_heads": 2}, {}, "258"),
        ({}, {"deterministic": True}, "rows"),
        ({}, {"kv_dtype": "int4"}, "int4"),
        ({}, {"dtype": "float64"}, "float64"),
    ],
)
def test_refusals(spec: dict[str, int], need: dict[str, object], said: str) -> None:
    reason = TritonAttention(CPU).refuses(make_need(make_spec(**spec), **need))
    assert reason is not None and said in reason and "\n" not in reason


def child(code: str, **environ: str) -> str:
    ours = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=ours | environ, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


NEED = """
import sys, torch
from dovetail.attention_backends.triton.backend import TritonAttention
from tests.attention_backends.sequences import make_need, make_spec
need = make_need(make_spec())
print(TritonAttention(torch.device("cpu")).refuses(need))
"""
LOADED = "print([name for name in sys.modules if name.split('.')[0] == 'triton'])"
GPU = 'print(TritonAttention(torch.device("cuda")).refuses(need))'


def test_a_cpu_is_refused_unless_kernels_are_interpreted() -> None:
    said, loaded, of_a_gpu = child(f"{NEED}{LOADED}\n{GPU}").splitlines()
    assert "GPU" in said and loaded == "[]", "listing it imports no Triton"
    assert "finds no GPU" in of_a_gpu or torch.cuda.is_available()
    assert child(NEED, TRITON_INTERPRET="1") == "None"


def test_without_triton_it_says_so() -> None:
    assert "pip install triton" in child(
        "import importlib.util, importlib.machinery as m; found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'triton' else found(n, *a)" + NEED
    )


def test_the_table_is_complete_for_every_architecture() -> None:
    for architecture in (*tuning.architectures(), "sm_75", "gfx1100"):
        read = Tuning.of(architecture)
        for kernel in ("prefill", "decode"):
            for size in HEAD_SIZES:
                for kind in KINDS:
                    tile = read.tile(kernel, size, kind)
                    for number in (tile.rows, tile.keys, tile.warps):
                        assert number & (number - 1) == 0
        assert read.most_parts & (read.most_parts - 1) == 0


def test_an_unknown_architecture_gets_the_default() -> None:
    assert Tuning.of("sm_999") == Tuning.of("default")
    assert Tuning.of("sm_103").tiles == Tuning.of("sm_100").tiles != Tuning.of("sm_80").tiles
    assert Tuning.of("sm_103").native_e4m3 and not Tuning.of("gfx942").native_e4m3


def parts(rows: int, *, window: int | None = None) -> int:
    spec = make_spec(heads=32, kv_heads=8, size=128, window=window)
    layer = Layer(spec, torch.bfloat16, "bfloat16", 16, Target.named("sm_90", 132), None)
    none = torch.zeros(0)
    arrays = dict.fromkeys(("starts", "lens", "slots", "meta", "tables"), none)
    return layer.parts(Plan(**arrays, num_tokens=rows, num_rows=rows, few=True, many=False))


def test_parts_keep_the_gpu_busy_and_follow_from_rows_alone() -> None:
    assert [parts(rows) for rows in (1, 8, 32, 256)] == [64, 16, 4, 1]
    assert parts(1, window=1024) == 16
