"""Versions of the packages that matter, from their metadata: nothing of them is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata

__all__ = ["missing_packages", "package_versions"]

_FOUNDATIONS = ("numpy", "torch", "jax", "jaxlib", "triton", "transformers")
"""Frameworks, which platforms may need without saying so in their metadata."""


def package_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of the distributions, of what they require, and of the frameworks; those that are
    installed, by name."""
    names = set(_FOUNDATIONS)
    for distribution in distributions:
        names |= {distribution, *_required(distribution)}
    versions = {name: _version(name) for name in sorted(names)}
    return {name: version for name, version in versions.items() if version is not None}


def missing_packages(distribution: str) -> tuple[str, ...]:
    """What the distribution requires on every system and is not installed."""
    return tuple(name for name in _required(distribution) if _version(name) is None)


def _required(distribution: str) -> tuple[str, ...]:
    """Names of what it requires, apart from extras and what only some systems need."""
    try:
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return ()
    needed = (text for text in requirements if ";" not in text)
    return tuple(re.split(r"[^A-Za-z0-9._-]", text)[0] for text in needed)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
