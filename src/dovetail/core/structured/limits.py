"""What one grammar may cost, the same in the process that examines it and in the engine."""

from __future__ import annotations

__all__ = ["ANSWER_S", "COMPILE_S", "EXTRA_BYTES", "STACK_BYTES"]

COMPILE_S = 1.5
"""Seconds of processor time to compile a grammar and to work out its first masks."""
ANSWER_S = 10.0
"""Seconds to wait for that, however busy the machine is."""
EXTRA_BYTES = 512 << 20
"""Memory beyond what the examining process has once its vocabulary is read."""
STACK_BYTES = 8 << 20
"""Of the threads that compile."""
