"""Kernels that are compiled while weights are read.

Which kernels a model needs, and for which sizes, is a matter of its config. So a model of two
layers and the same sizes, its weights made up, goes through the first steps of the warm-up in a
thread of its own; what is compiled there is found compiled by the real one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dovetail.core.contracts.runner import RunnerConfig

__all__ = ["Understudy", "understudied"]

_log = logging.getLogger(__name__)

_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
"""What configs call the number of layers."""
_LAYERS = 2
"""Where layers differ, they take turns."""


def understudied(config: RunnerConfig) -> RunnerConfig:
    """The config of the small model."""
    shallow: dict[str, Any] = {
        name: min(config.hf_config[name], _LAYERS) for name in _DEPTHS if name in config.hf_config
    }
    kinds = config.hf_config.get("layer_types")
    if kinds:
        shallow["layer_types"] = kinds[:_LAYERS]
    return replace(config, hf_config=config.hf_config | shallow, load_format="dummy", draft=None)


class Understudy:
    """Runs the small model's rehearsals, from now on.

    Args:
        rehearse: Loads a model of such a config, takes it through its warm-up, and drops it.
        config: Of the real model.
    """

    def __init__(self, rehearse: Callable[[RunnerConfig], None], config: RunnerConfig) -> None:
        self._rehearse = rehearse
        self._config = understudied(config)
        self._thread = threading.Thread(target=self._run, name="understudy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._rehearse(self._config)
        except Exception:
            _log.warning(
                "compiling ahead failed; the warm-up will compile what it needs", exc_info=True
            )

    def wait(self) -> None:
        """Return once it is done, and its memory free."""
        self._thread.join()
