"""A cache that is bounded by bytes, and keeps what was used last."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

__all__ = ["ByteLru"]

V = TypeVar("V")


class ByteLru(Generic[V]):
    """Values by key, each at a cost that its owner names. Belongs to one thread at a time.

    Args:
        capacity: The most that all may cost together; what costs more by itself is not kept.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: OrderedDict[bytes, tuple[V, int]] = OrderedDict()
        self._cost = 0

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: bytes) -> V | None:
        """The value, which counts as used now; None if it is not here."""
        item = self._items.get(key)
        if item is None:
            return None
        self._items.move_to_end(key)
        return item[0]

    def put(self, key: bytes, value: V, cost: int) -> None:
        """Keep a value; those that were not used for longest make room."""
        self.drop(key)
        self._items[key] = (value, cost)
        self._cost += cost
        while self._cost > self._capacity:
            _, (_, freed) = self._items.popitem(last=False)
            self._cost -= freed

    def drop(self, key: bytes) -> None:
        """Forget a value, if it is here."""
        if key in self._items:
            self._cost -= self._items.pop(key)[1]
