"""The guide to platforms shows code that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?:python|toml) (\S+)\n(.*?)^```$", re.M | re.S)


def test_every_block_of_the_guide_is_in_the_file_that_it_names() -> None:
    blocks = BLOCK.findall((ROOT / "docs/writing-a-platform.md").read_text("utf-8"))
    assert {path.rpartition("/")[2] for path, _ in blocks} == {
        "pyproject.toml",
        "__init__.py",
        "platform.py",
        "attention.py",
    }
    for path, text in blocks:
        assert lines(text) in lines((ROOT / path).read_text("utf-8")), f"{path} has no such code"


def lines(text: str) -> str:
    """Without indentation and empty lines, which formatters of the guide change."""
    return "\n".join(filter(None, map(str.strip, text.splitlines()))) + "\n"


def test_the_example_is_as_short_as_the_guide_says() -> None:
    files = (ROOT / "plugins/dovetail-sim/src/dovetail_sim").glob("*.py")
    assert sum(len(path.read_text("utf-8").splitlines()) for path in files) < 300
