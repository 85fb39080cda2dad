"""The environment variables of Dovetail, read in this one place."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping

from dovetail.core.config.parsers import flag
from dovetail.core.config.schema import EngineConfig, nearest
from dovetail.core.errors import ConfigError
from dovetail.core.plugins.entries import installed_entries

__all__ = ["KNOWN_VARIABLES", "Environment", "read_environment", "with_environment"]

_log = logging.getLogger(__name__)

KNOWN_VARIABLES: dict[str, str] = {
    "DOVETAIL_DEVICE": "Platform to run on, unless --device names one.",
    "DOVETAIL_ATTENTION_BACKEND": "Attention backend, unless --attention-backend names one.",
    "DOVETAIL_PLUGINS": "Plug-ins or packages whose code may run; empty: built-ins only.",
    "DOVETAIL_PROBE_TIMEOUT": "Seconds that a platform may take to say whether it is usable.",
    "DOVETAIL_API_KEY": "Key that clients of the server must send, unless --api-key names some.",
    "DOVETAIL_ALLOW_LONG_MAX_MODEL_LEN": "1 allows max_model_len beyond the model's own limit.",
    "DOVETAIL_FAULTS": "Faults to order at named points, for tests; see docs/proof.md.",
    "DOVETAIL_USE_MODELSCOPE": "Reserved.",
}
"""Every variable with its meaning."""

_FREE_PREFIXES = ("DOVETAIL_TEST_", "DOVETAIL_BENCH_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """What the environment asks for."""

    device: str | None = None
    attention_backend: str | None = None
    allow_long_max_model_len: bool = False


def read_environment(environ: Mapping[str, str] = os.environ, *, warn: bool = True) -> Environment:
    """Read the variables; empty ones count as absent.

    Args:
        environ: Where to look.
        warn: Log a warning for each unknown ``DOVETAIL_*`` variable.

    Raises:
        ConfigError: A value is not allowed.
    """
    if warn:
        for line in unknown_variables(environ):
            _log.warning("%s", line)
    return Environment(
        device=environ.get("DOVETAIL_DEVICE") or None,
        attention_backend=environ.get("DOVETAIL_ATTENTION_BACKEND") or None,
        allow_long_max_model_len=_flag(environ, "DOVETAIL_ALLOW_LONG_MAX_MODEL_LEN"),
    )


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """One line for each ``DOVETAIL_*`` variable that means nothing, with the nearest known one.

    Those that go on with the name of an installed platform are its own: ``DOVETAIL_ACME_...``.
    """
    ours = [name for name in environ if name.startswith("DOVETAIL_")]
    strange = [name for name in sorted(ours) if name not in KNOWN_VARIABLES]
    if not strange:
        return []
    free = (*_FREE_PREFIXES, *(f"DOVETAIL_{_as_variable(name)}_" for name in _platforms()))
    return [
        f"the environment variable {name} is unknown{nearest(name, KNOWN_VARIABLES)}"
        for name in strange
        if not name.startswith(free)
    ]


def _platforms() -> set[str]:
    return {entry.name for entry in installed_entries() if entry.group == "dovetail.platforms"}


def _as_variable(name: str) -> str:
    return name.upper().replace("-", "_")


def with_environment(config: EngineConfig, environment: Environment) -> EngineConfig:
    """The intent, where what the user left open comes from the environment.

    The device stays open: its selection reads the variable itself, to say where the name is from.
    """
    backend = config.attention_backend or environment.attention_backend
    return dataclasses.replace(config, attention_backend=backend)


def _flag(environ: Mapping[str, str], name: str) -> bool:
    try:
        return flag(environ.get(name) or "0")
    except ValueError as error:
        raise ConfigError(f"{name} must be {error}, not {environ[name]!r}") from None
