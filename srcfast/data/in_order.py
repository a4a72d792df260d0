"""Values looked up by key while they are read: what lies in files in the order in which it is asked for need not be in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Generic, TypeVar

from srcfast.data.records import Candidate
from srcfast.errors import InputError

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


def group_by_sample(candidates: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    """Candidates as the shards hold them, one after the other, by their sample's id."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.sample_id, []).append(candidate)
    return groups


def samples_in_order(candidates: Iterable[Candidate]) -> InOrder[list[Candidate]]:
    """`group_by_sample` while they are read: for samples that are asked for in the shards' order.

    Raises (when it comes to it):
        InputError: a sample's candidates are not one after the other.
    """
    return InOrder(_groups(candidates))


def _groups(candidates: Iterable[Candidate]) -> Iterator[tuple[str, list[Candidate]]]:
    seen: set[str] = set()
    for sample_id, own in groupby(candidates, key=lambda one: one.sample_id):
        if sample_id in seen:
            raise InputError(
                sample_id=sample_id,
                field="sample_id",
                expected="a sample's candidates one after the other",
                found="some of them behind another sample's",
                fix="sort the candidates by sample",
            )
        seen.add(sample_id)
        yield sample_id, list(own)
