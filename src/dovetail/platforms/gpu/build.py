"""What the installed torch was built for, without importing it: for probes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

__all__ = ["TorchBuild", "torch_build"]


@dataclass(frozen=True, kw_only=True)
class TorchBuild:
    """A build of torch."""

    version: str
    cuda: str | None
    """Version of NVIDIA's toolkit, if it is built for that."""
    hip: str | None
    """Version of AMD's, if it is built for that."""


def torch_build() -> TorchBuild | None:
    """The installed build; None if torch is not installed, or does not say what it is."""
    spec = find_spec("torch")
    folders = spec.submodule_search_locations if spec is not None else None
    file = Path(folders[0], "version.py") if folders else None
    if file is None or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    found = {
        name: re.search(rf"^{name}\b[^=]*= *'([^']*)'", text, re.M)
        for name in ("__version__", "cuda", "hip")
    }
    version, cuda, hip = (None if match is None else match[1] for match in found.values())
    return None if version is None else TorchBuild(version=version, cuda=cuda, hip=hip)
