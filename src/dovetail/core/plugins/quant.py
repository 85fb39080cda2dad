"""Quantization schemes that are installed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dovetail.core.contracts.quant import QuantScheme
from dovetail.core.plugins.entries import AllowList
from dovetail.core.plugins.registry import Registry, subclass_of

__all__ = ["QUANT_GROUP", "make_scheme", "quant_registry"]

QUANT_GROUP = "dovetail.quant"


def quant_registry(environ: Mapping[str, str] = os.environ) -> Registry[type[QuantScheme]]:
    """The schemes that are installed and that ``DOVETAIL_PLUGINS`` admits."""
    allowed = AllowList.from_environ(environ)
    return Registry(QUANT_GROUP, "quantization scheme", subclass_of(QuantScheme), allowed=allowed)


def make_scheme(name: str, hf_config: Mapping[str, Any]) -> QuantScheme:
    """The scheme of that name, for a model.

    Args:
        name: Of the scheme.
        hf_config: The checkpoint's ``config.json``.

    Raises:
        SelectionError: No scheme of that name is installed.
        PluginError: It cannot be imported or is no scheme.
        UnsupportedError: It cannot honour the checkpoint's settings.
    """
    settings = hf_config.get("quantization_config")
    return quant_registry().load(name)(settings if isinstance(settings, Mapping) else {})
