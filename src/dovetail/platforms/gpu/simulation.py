"""A GPU platform without its GPU, when somebody asks for that: right, and very slow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from dovetail.core.contracts.platform import ProbeResult

__all__ = ["Simulation"]

_WORDS = {"": False, "0": False, "1": True}


@dataclass(frozen=True)
class Simulation:
    """The switch of one platform: an environment variable, 1 or 0."""

    variable: str

    def mentioned(self, environ: Mapping[str, str] = os.environ) -> bool:
        """Whether the variable says anything but that there shall be none."""
        return _WORDS.get(self._word(environ), True)

    def wanted(self, environ: Mapping[str, str] = os.environ) -> bool:
        """Whether it is on."""
        return _WORDS.get(self._word(environ), False)

    def _word(self, environ: Mapping[str, str]) -> str:
        return environ.get(self.variable, "").strip()

    def probe(self, environ: Mapping[str, str] = os.environ) -> ProbeResult:
        """Whether the host can stand in."""
        word = self._word(environ)
        if word not in _WORDS:
            reason = f"{self.variable}={word!r:.40} must be 1 or 0"
            return ProbeResult(usable=False, reason=reason)
        if find_spec("triton") is None:
            return ProbeResult(usable=False, reason="triton is not installed: pip install triton")
        reason = f"simulated on the CPU ({self.variable}=1), for development"
        return ProbeResult(usable=True, reason=reason, num_devices=1)

    def environment(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """What must be set before the engine starts."""
        return {"TRITON_INTERPRET": "1"} if self.wanted(environ) else {}
