"""``docs/sampling.md`` lists every field of ``SamplingParams`` as the source has it.

After a change: ``python -m tests.core.test_sampling_docs`` writes the table anew.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import msgspec

from dovetail.core import request
from dovetail.core.request import SamplingParams
from dovetail.core.server.protocol import ChatCompletionRequest, CompletionRequest

PAGE = Path(__file__).parents[2] / "docs/sampling.md"
TABLE = re.compile(r"^\| field \|.*?\n(?=\n)", re.DOTALL | re.MULTILINE)
OFFLINE = {"detokenize"}
"""Fields without a meaning in a request over HTTP, which wants text."""


def meanings() -> dict[str, str]:
    """The docstring behind each field, on one line."""
    (tree,) = ast.parse(inspect.getsource(SamplingParams)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            doc = after.value if isinstance(after, ast.Expr) else None
            text = doc.value if isinstance(doc, ast.Constant) else ""
            found[field.target.id] = " ".join(str(text).replace("``", "`").split())
    return found


def default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def table() -> str:
    lines = ["| field | default | allowed | meaning |", "|---|---|---|---|"]
    texts = meanings()
    for field in msgspec.structs.fields(SamplingParams):
        allowed = request._RULES[field.name][2]
        value = default(field)
        shown = "none" if value is None else str(value).lower()
        lines.append(f"| `{field.name}` | `{shown}` | {allowed} | {texts[field.name]} |")
    return "\n".join(lines) + "\n"


def test_the_page_has_the_table_of_the_source() -> None:
    found = TABLE.search(PAGE.read_text("utf-8"))
    assert found and found.group() == table(), "run: python -m tests.core.test_sampling_docs"


def test_every_field_has_a_meaning_and_a_rule() -> None:
    for field in msgspec.structs.fields(SamplingParams):
        assert len(meanings()[field.name]) > 20, field.name
        assert field.name in request._RULES, field.name


def test_every_field_can_be_asked_for_over_http() -> None:
    names = {field.name for field in msgspec.structs.fields(SamplingParams)} - OFFLINE
    for kind in (CompletionRequest, ChatCompletionRequest):
        assert names <= set(kind.__struct_fields__)


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text("utf-8")), "utf-8")
