"""The platform stays small: lines of code, without blank lines, comments and docstrings."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import dovetail_tpu

LIMIT = 900
"""Of all modules at the top of the package: runner, ops, sampling and the XLA attention backend.

The Pallas kernels in ``pallas/`` are not counted.
"""

_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Lines that hold code; a string that is a statement of its own is a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_what_counts_as_code() -> None:
    source = '"""Doc\nstring."""\n\n# A comment.\nx = [\n    1,  # one\n\n]\n"""Of x."""\n'
    assert code_lines(source) == 3


def test_the_platform_is_below_its_limit() -> None:
    folder = Path(dovetail_tpu.__file__).parent
    counts = {path.name: code_lines(path.read_text("utf-8")) for path in folder.glob("*.py")}
    assert {"runner.py", "sampler.py", "xla.py"} <= counts.keys()
    assert sum(counts.values()) < LIMIT, counts
