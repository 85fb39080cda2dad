"""Linear layers that were bound once, so that the next start need not bind them again."""

from __future__ import annotations

from typing import Any, Protocol

from dovetail.core.contracts.model import Linear

__all__ = ["KeptLayers"]


class KeptLayers(Protocol):
    """Of one checkpoint, as one platform binds it."""

    def find(self, path: str, leaf: Linear) -> Any:
        """What the layer was bound to by ``bind_rows``, or by its scheme; None: nothing is kept.

        Args:
            path: Of the layer in the model's tree.
            leaf: Its declaration. What another one was bound to is not found.
        """
        ...

    def keep(self, path: str, leaf: Linear, bound: Any) -> None:
        """Keep what a layer, which was not found, has been bound to; it may be of no known kind."""
        ...

    def finish(self) -> None:
        """There are no more layers."""
        ...
