"""The ``dovetail`` command. Importing it loads nothing; each command loads what it needs."""

from dovetail.core.cli.entry import main

__all__ = ["main"]
