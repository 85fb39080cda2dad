"""Known gaps: checks that a platform fails, and why, in a text file of its package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path

from dovetail.core.errors import ConfigError
from dovetail.core.plugins.entries import Entry

__all__ = ["FILE_NAME", "KnownGaps"]

FILE_NAME = "known_gaps.txt"


@dataclass(frozen=True)
class KnownGaps:
    """Reasons by patterns of check names, as ``fnmatch`` has them."""

    lines: Mapping[str, str] = field(default_factory=dict)
    origin: str = FILE_NAME
    """Where the lines stand, for messages."""

    @classmethod
    def parse(cls, text: str, origin: str) -> KnownGaps:
        """Lines ``pattern: reason``; empty lines and those that begin with # are passed over.

        Raises:
            ConfigError: A line has no reason, or a pattern stands there twice.
        """
        lines: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            pattern, colon, reason = (part.strip() for part in line.partition(":"))
            if not (pattern and colon and reason):
                raise ConfigError(
                    f"{origin}, line {number}: {line.strip()!r:.80} must be `check name: reason`."
                )
            if pattern in lines:
                raise ConfigError(f"{origin}, line {number}: {pattern} is there already.")
            lines[pattern] = reason
        return cls(lines, origin)

    @classmethod
    def read(cls, path: Path) -> KnownGaps:
        """From a file. Raises ConfigError if it cannot be read."""
        try:
            return cls.parse(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The known gaps cannot be read from {path}: {error}.") from error

    @classmethod
    def of(cls, entry: Entry) -> KnownGaps:
        """Those that a plug-in ships in the package of its entry point; none if it ships none."""
        package = entry.value.partition(":")[0].partition(".")[0]
        if entry.builtin:
            return cls()
        try:
            file = resources.files(package) / FILE_NAME
        except (ImportError, TypeError):
            return cls()
        if not file.is_file():
            return cls()
        return cls.parse(file.read_text("utf-8"), f"{package}/{FILE_NAME}")

    def reason(self, name: str) -> str | None:
        """Why the check may fail; None if it may not."""
        found = (reason for pattern, reason in self.lines.items() if fnmatchcase(name, pattern))
        return next(found, None)

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """Patterns that fit none of the names."""
        return [
            pattern
            for pattern in self.lines
            if not any(fnmatchcase(name, pattern) for name in names)
        ]
