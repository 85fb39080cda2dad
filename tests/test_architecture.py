"""The rules of the tree, held over its text. Each rule is shown to be able to fail."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("src/dovetail", "plugins", "tests")

LAYERS = (
    ("errors", "machine", "types"),
    ("constraint", "request", "batch", "buckets", "update"),
    ("contracts",),
    (
        "plugins",
        "shapes",
        "kv",
        "scheduler",
        "models",
        "sampling",
        "config",
        "tokenizer",
        "demo",
        "faults",
        "speculative",
        "structured",
        "template",
    ),
    ("engine",),
    ("llm", "server", "bench", "conformance", "simulate"),
    ("cli",),
)
"""``core``, from the bottom up: a module may import its own layer and those before it."""

NEIGHBOURS = ("platforms", "attention_backends", "quant")
"""What implements the contracts. None imports another; all are found through entry points."""

ABOVE_IMPLEMENTATIONS = ("engine", "llm", "server", "bench", "cli")
"""Parts of the core that no implementation may import."""

VENDOR_MODULE = re.compile(
    r"(torch\.(cuda|xpu|accelerator|mps|mtia|hpu|npu|version)|torch_npu|torch_xla|torch_sendnn"
    r"|habana_frameworks|intel_extension_for_pytorch|flash_attn|flashinfer|xformers|vllm|triton"
    r"|pycuda|pynvml)(\.|$)"
)
VENDOR_USE = re.compile(
    r"torch\b.*\.(cuda|xpu|accelerator|mps|mtia|hpu|npu)|.*\.is_(cuda|xpu|hpu|npu)"
)
VENDOR_STRING = re.compile(
    r"(cuda|rocm|hip|xpu|tpu|hpu|npu|mps|mtia|gaudi|ascend|spyre|nvidia|habana)(:.*)?", re.I
)
VENDORS_ALLOWED = ("src/dovetail/attention_backends/triton", "src/dovetail/platforms/gpu")
"""What is written for GPUs of several vendors, and belongs to none of their packages."""
FRAMEWORKS = ("torch", "jax", "jaxlib", "tensorflow")
UNSAFE_MODULES = ("pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
UNSAFE_CALLS = ("eval", "exec", "os.system", "os.popen", "yaml.load", "torch.load")

MAX_FILE, MAX_FUNCTION = 400, 60


@dataclass(frozen=True)
class Source:
    """One file: its path from the root of the repository, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def package(self) -> tuple[str, ...]:
        """The dotted name of the package that holds it: ``("dovetail", "core", "kv")``."""
        return tuple(self.path.split("/")[1:-1]) if self.in_source else ()

    @property
    def in_source(self) -> bool:
        return self.path.startswith("src/dovetail/")

    @property
    def place(self) -> tuple[str, ...]:
        """Folder and part under ``dovetail``: ``("core", "kv")``, ``("quant", "int8")``."""
        return tuple(self.path.removesuffix(".py").split("/")[2:4]) if self.in_source else ()


Rule = Callable[[Source], Iterator[str]]


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that is imported, inside functions too."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = source.package[: len(source.package) - node.level + 1] if node.level else ()
            base = [*start, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(
            ("import_module", "__import__")
        ):
            found = [argument for argument in node.args if isinstance(argument, ast.Constant)]
            yield from ((node.lineno, str(argument.value)) for argument in found)


def dotted(node: ast.AST) -> str:
    """``a.b.c`` for a chain of attributes, ``""`` for anything else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else f".{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def within(name: str, modules: tuple[str, ...] | list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def implements(source: Source) -> bool:
    """Whether the file belongs to an implementation of the contracts, and is no test."""
    in_plugin = source.path.startswith("plugins/") and "/tests/" not in source.path
    return in_plugin or source.place[:1] in [(folder,) for folder in NEIGHBOURS]


def layer(part: str) -> int | None:
    return next((level for level, parts in enumerate(LAYERS) if part in parts), None)


def directions(source: Source) -> Iterator[str]:
    """Dependencies point inward, to the core, and down inside it."""
    folder, part = (*source.place, "", "")[:2]
    own = layer(part)
    if folder == "core" and part != "__init__" and own is None:
        yield f"1: core.{part} has no layer; give it one in LAYERS"
    for line, name in imports(source):
        top, target_folder, target = (*name.split("."), "", "")[:3]
        if top != "dovetail":
            continue
        if folder in ("core", *NEIGHBOURS) and target_folder in NEIGHBOURS:
            if target_folder != folder:
                yield f"{line}: {folder} imports {target_folder}"
        elif target_folder == "core" and folder == "core":
            level = layer(target)
            if own is not None and level is not None and level > own:
                yield f"{line}: core.{part} imports core.{target}, which is above it"
        elif target_folder == "core" and target in ABOVE_IMPLEMENTATIONS and implements(source):
            yield f"{line}: an implementation imports core.{target}"


def vendors(source: Source) -> Iterator[str]:
    """Neutral code names no vendor."""
    if not source.in_source or source.path.startswith(VENDORS_ALLOWED):
        return
    for line, name in imports(source):
        if VENDOR_MODULE.match(name):
            yield f"{line}: imports {name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and VENDOR_USE.fullmatch(dotted(node)):
            yield f"{node.lineno}: uses {dotted(node)}"
        elif isinstance(node, ast.Constant) and VENDOR_STRING.fullmatch(str(node.value)):
            yield f"{node.lineno}: names {node.value!r}"


def frameworks(source: Source) -> Iterator[str]:
    """The core imports no array framework, not even inside a function."""
    if source.place[:1] == ("core",):
        for line, name in imports(source):
            if within(name, FRAMEWORKS):
                yield f"{line}: the core imports {name}"


def short_names(source: Source) -> Iterator[str]:
    """``dovetail.core`` is never imported as ``core``: that would be another module."""
    for line, name in imports(source):
        if within(name, ("core", *NEIGHBOURS)):
            yield f"{line}: imports {name}; say dovetail.{name}"


def lengths(source: Source) -> Iterator[str]:
    """Files and functions stay short."""
    num_lines = len(source.text.splitlines())
    if num_lines > MAX_FILE:
        yield f"1: {num_lines} lines; at most {MAX_FILE}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{node.lineno}: {node.name} has {length} lines; at most {MAX_FUNCTION}"


def habits(source: Source) -> Iterator[str]:
    """No assert, no global, no error that disappears."""
    if not source.path.startswith("tests/") and "/tests/" not in source.path:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Assert):
                yield f"{node.lineno}: assert"
            elif isinstance(node, ast.Global):
                yield f"{node.lineno}: global"
            elif isinstance(node, ast.ExceptHandler):
                broad = node.type is None or dotted(node.type) in ("Exception", "BaseException")
                silent = all(isinstance(step, ast.Pass | ast.Continue) for step in node.body)
                if node.type is None or (broad and silent):
                    yield f"{node.lineno}: an error is swallowed"


def unsafe(source: Source) -> Iterator[str]:
    """Nothing that runs code out of data."""
    if source.path.startswith("tests/") or "/tests/" in source.path:
        return
    for line, name in imports(source):
        if within(name, UNSAFE_MODULES):
            yield f"{line}: imports {name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            if dotted(node.func) in UNSAFE_CALLS:
                yield f"{node.lineno}: calls {dotted(node.func)}"
            for keyword in node.keywords:
                on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg == "shell" and on:
                    yield f"{node.lineno}: starts a shell"


RULES: tuple[Rule, ...] = (
    directions, vendors, frameworks, short_names, lengths, habits, unsafe
)  # fmt: skip


@cache
def sources() -> list[Source]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) for path in paths]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule: Rule) -> None:
    found = [f"{source.path}:{complaint}" for source in sources() for complaint in rule(source)]
    assert found == [], "\n".join([rule.__doc__ or "", *found])


CORE, QUANT, PLUGIN = "src/dovetail/core/kv/x.py", "src/dovetail/quant/x.py", "plugins/p/src/p/x.py"
LONG = "def f():\n" + "    x = 1\n" * 60
PLANTED = [
    (directions, CORE, "from dovetail.platforms.null import PLUGIN"),
    (directions, CORE, "import dovetail.quant"),
    (directions, CORE, "def f():\n    from dovetail import attention_backends"),
    (directions, CORE, "from dovetail.core.engine.api import EngineClient"),
    (directions, CORE, "from ..engine import api"),
    (directions, CORE, "import importlib\nimportlib.import_module('dovetail.platforms.torch')"),
    (directions, "src/dovetail/core/errors.py", "from dovetail.core.batch import Batch"),
    (directions, "src/dovetail/core/contracts/x.py", "from dovetail.core import kv"),
    (directions, "src/dovetail/core/engine/x.py", "import dovetail.core.server.app"),
    (directions, "src/dovetail/core/server/x.py", "from dovetail.core.cli import main"),
    (directions, "src/dovetail/core/novelty/x.py", "x = 1"),
    (directions, QUANT, "from dovetail.platforms.torch.ops import linear"),
    (directions, QUANT, "from dovetail.core.engine import build"),
    (directions, PLUGIN, "from dovetail.core.server import app"),
    (vendors, CORE, "import torch.cuda"),
    (vendors, CORE, "from torch import xpu"),
    (vendors, QUANT, "import torch\ntorch.cuda.synchronize()"),
    (vendors, QUANT, "import torch\nx = torch.backends.mps.is_available"),
    (vendors, QUANT, "import flash_attn"),
    (vendors, QUANT, "x = tensor.is_cuda"),
    (vendors, CORE, "if name == 'cuda': pass"),
    (vendors, CORE, "x = 'CUDA:0'"),
    (frameworks, CORE, "import torch"),
    (frameworks, CORE, "def f():\n    from jax import numpy"),
    (frameworks, CORE, "__import__('torch')"),
    (short_names, "tests/x.py", "import core.engine"),
    (short_names, PLUGIN, "from platforms import null"),
    (lengths, "tests/x.py", "x = 1\n" * 401),
    (lengths, PLUGIN, LONG),
    (habits, CORE, "assert True"),
    (habits, PLUGIN, "def f():\n    global x"),
    (habits, CORE, "try: x = 1\nexcept: raise"),
    (habits, CORE, "try: x = 1\nexcept Exception: pass"),
    (unsafe, CORE, "import pickle"),
    (unsafe, CORE, "from torch import load\nimport torch\ntorch.load('x')"),
    (unsafe, PLUGIN, "eval('1')"),
    (unsafe, CORE, "import os\nos.system('ls')"),
    (unsafe, CORE, "import subprocess\nsubprocess.run('ls', shell=True)"),
]
ALLOWED = [
    (directions, QUANT, "from dovetail.core.contracts.quant import QuantScheme"),
    (directions, QUANT, "from dovetail.quant import layout\nfrom . import layout"),
    (directions, CORE, "from dovetail.core.scheduler import rows\nfrom ..errors import UserError"),
    (directions, PLUGIN, "from dovetail.platforms.torch.platform import TorchPlatform"),
    (directions, "tests/x.py", "from dovetail.core.server import app"),
    (vendors, PLUGIN, "import torch\ntorch.cuda.synchronize()"),
    (vendors, "src/dovetail/attention_backends/triton/x.py", "import triton"),
    (vendors, CORE, '"""Says nothing of cuda."""\nx = "the cuda cores"'),
    (frameworks, QUANT, "import torch"),
    (short_names, "tests/x.py", "import dovetail.core\nimport coreutils"),
    (lengths, "tests/x.py", "x = 1\n" * 400),
    (habits, "tests/x.py", "assert True"),
    (habits, CORE, "try: x = 1\nexcept KeyError: pass"),
    (unsafe, CORE, "model.eval()"),
]


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_a_planted_violation_is_found(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_what_is_allowed_is_not_found(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text))) == []
