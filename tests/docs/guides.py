"""The packages that guides show: code blocks whose first line names a file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"^```\w+ (?P<path>\S+)\n(?P<text>.*?)^```$", re.M | re.S)


def files_of(guide: str) -> dict[str, str]:
    """What the guide's files hold, by path."""
    text = (DOCS / guide).read_text(encoding="utf-8")
    return {match["path"]: match["text"] for match in _BLOCK.finditer(text)}


def install(guide: str, target: Path) -> None:
    """Put the guide's package where Python finds it, as pip would: code and metadata."""
    files = files_of(guide)
    for path, text in files.items():
        if path.startswith("src/"):
            file = target / path.removeprefix("src/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = target / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    sections = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n\n".join(sections) + "\n")
