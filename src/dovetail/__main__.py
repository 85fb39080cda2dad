"""``python -m dovetail`` is the ``dovetail`` command."""

from __future__ import annotations

import sys

from dovetail.core.cli import main

if __name__ == "__main__":
    sys.exit(main())
