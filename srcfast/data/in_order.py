"""Look up values by key while they are read, so that files in the order of the lookups need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Generic, TypeVar

from srcfast.data.records import Candidate
from srcfast.errors import InputError

Value = TypeVar("Value")


class InOrder(Generic[Value]):
    """Look up (key, value) pairs that are read lazily; each value is returned once.

    Pairs that are read on the way to a key are buffered until they are looked up. If lookups have the order of the pairs, no
    pair is buffered; in any other order up to all are.
    """

    def __init__(self, pairs: Iterable[tuple[str, Value]]) -> None:
        self._pairs = iter(pairs)
        self._buffered: dict[str, Value] = {}

    def get(self, key: str) -> Value | None:
        """Return a key's value; None: there is none, or it was returned before."""
        if key in self._buffered:
            return self._buffered.pop(key)
        for other, value in self._pairs:
            if other == key:
                return value
            self._buffered[other] = value
        return None

    def rest(self) -> Iterator[tuple[str, Value]]:
        """Yield the pairs that were not looked up."""
        yield from self._buffered.items()
        yield from self._pairs


def samples_in_order(candidates: Iterable[Candidate]) -> InOrder[list[Candidate]]:
    """Group candidates by sample id while they are read, for lookups in the shards' order.

    Raises (during a lookup):
        InputError: a sample's candidates are not consecutive.
    """
    return InOrder(_groups(candidates))


def _groups(candidates: Iterable[Candidate]) -> Iterator[tuple[str, list[Candidate]]]:
    seen: set[str] = set()
    for sample_id, group in groupby(candidates, key=lambda candidate: candidate.sample_id):
        if sample_id in seen:
            raise InputError(
                sample_id=sample_id,
                field="sample_id",
                expected="a sample's candidates one after the other",
                found="some of them behind another sample's",
                fix="sort the candidates by sample",
            )
        seen.add(sample_id)
        yield sample_id, list(group)
