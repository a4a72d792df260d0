"""Values looked up by key while they are read: what lies in files in the order in which it is asked for need not be in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class InOrder(Generic[Value]):
    """`get` over (key, value) pairs that are read as they are asked for, each handed out once.

    What is passed over on the way to a key is kept until it is asked for: asked in the order in which the pairs come, one
    pair is held at a time; in any other order, up to all.
    """

    def __init__(self, pairs: Iterable[tuple[str, Value]]) -> None:
        self._pairs = iter(pairs)
        self._kept: dict[str, Value] = {}

    def get(self, key: str) -> Value | None:
        """The key's value, None where there is none or it was handed out."""
        if key in self._kept:
            return self._kept.pop(key)
        for other, value in self._pairs:
            if other == key:
                return value
            self._kept[other] = value
        return None

    def rest(self) -> Iterator[tuple[str, Value]]:
        """What nobody asked for."""
        yield from self._kept.items()
        yield from self._pairs
