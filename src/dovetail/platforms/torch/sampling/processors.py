"""Logits processors of plug-ins, applied to the rows that ask for them; one that fails ends its
request.

The scheduler lets no step run ahead of such a row, so that its last token has been computed, and
seen by the host, when it is read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.core.batch import JoinedRow
from dovetail.core.contracts.logits import LogitsProcessor
from dovetail.core.errors import PluginError, SelectionError
from dovetail.core.plugins.logits import LogitsProcessors
from dovetail.core.plugins.registry import describe_error
from dovetail.platforms.torch.sampling.rows import Which

__all__ = ["Processors"]

_FAMILY = "torch"


@dataclass
class _Row:
    wanted: dict[str, Any]
    output: list[int]
    sampled: Tensor | None = None
    """(1,) the token that ``output`` lacks yet, on the device."""


class _Failed(Exception):  # noqa: N818 - says that a row failed, and is caught here
    """A processor did not do what it has to; the text says what."""


class Processors:
    """State of the rows that ask for processors."""

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}
        self._installed = LogitsProcessors()

    def drop(self, row: int) -> None:
        """Forget the row, if it is known."""
        self._rows.pop(row, None)

    def join(self, row: JoinedRow) -> None:
        """Begin with the tokens that the row generated before; nothing if it asks for none."""
        if row.params.logits_processors:
            output = row.token_ids[row.num_prompt_tokens :].tolist()
            self._rows[row.row] = _Row(row.params.logits_processors, output)

    def apply(self, logits_NV: Tensor, rows: Which) -> dict[int, str]:
        """Process float32 logits in place, each of the rows on its own.

        Returns:
            Why rows failed, by place. Their logits mean nothing.
        """
        failures: dict[int, str] = {}
        if not self._rows:
            return failures
        for place, row in enumerate(rows.tolist()):
            state = self._rows.get(row)
            if state is None:
                continue
            if state.sampled is not None:
                state.output.append(int(state.sampled))
                state.sampled = None
            for name, argument in state.wanted.items():
                try:
                    logits_NV[place] = self._process(name, logits_NV[place], state.output, argument)
                except _Failed as error:
                    failures[place] = f"the logits processor {name!r} {error}"
                    break
        return failures

    def update(self, rows: Which, token_ids_N: Tensor) -> None:
        """Remember the output token of each of the rows, without looking at it yet."""
        if not self._rows:
            return
        for place, row in enumerate(rows.tolist()):
            if row in self._rows:
                self._rows[row].sampled = token_ids_N[place : place + 1].clone()

    def _process(self, name: str, logits_V: Tensor, output: Sequence[int], argument: Any) -> Tensor:
        shape, device = logits_V.shape, logits_V.device
        processor = self._find(name)
        try:
            result = processor.apply(logits_V.clone(), tuple(output), argument)
        except (Exception, SystemExit) as error:
            raise _Failed(f"failed: {describe_error(error)}") from error
        if not isinstance(result, Tensor):
            raise _Failed(f"gave a {type(result).__name__}, not a tensor")
        given = (tuple(result.shape), result.dtype, result.device)
        if given != (tuple(shape), torch.float32, device):
            raise _Failed(
                f"gave {given[1]} of shape {given[0]} on {given[2]}, not torch.float32 of shape"
                f" {tuple(shape)} on {device}"
            )
        result = torch.where(torch.isneginf(logits_V), logits_V, result)
        most = result.amax()
        if not bool(torch.isfinite(most)):
            what = "left no token to choose" if bool(torch.isneginf(most)) else "gave NaN or +inf"
            raise _Failed(what)
        return result

    def _find(self, name: str) -> LogitsProcessor:
        try:
            processor = self._installed.get(name)
        except (PluginError, SelectionError) as error:
            raise _Failed(f"cannot be used: {error}") from error
        if processor.family != _FAMILY:
            raise _Failed(f"works on {processor.family} arrays; this platform has {_FAMILY}")
        return processor
