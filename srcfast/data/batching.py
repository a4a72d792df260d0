"""Which items a training step takes, and which of them each rank: pure functions of seed and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np


class BatchSettings(Protocol):
    """The settings that decide which items a step takes."""

    @property
    def epochs(self) -> int: ...

    @property
    def global_batch_size(self) -> int: ...

    @property
    def seed(self) -> int: ...


@lru_cache(maxsize=2)  # each step of an epoch asks, some of them twice; loaders are an epoch ahead at most
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation `[count]` of the items in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def num_steps(count: int, settings: BatchSettings) -> int:
    """Updates that `count` items make; an epoch's last global batch may be smaller."""
    return settings.epochs * math.ceil(count / settings.global_batch_size)


def global_batch(count: int, step: int, settings: BatchSettings) -> list[int]:
    """Indices of the items of update `step`."""
    epoch, within = divmod(step, math.ceil(count / settings.global_batch_size))
    begin = within * settings.global_batch_size
    return epoch_order(count, settings.seed, epoch)[begin : begin + settings.global_batch_size].tolist()


def rank_batch_indices(
    count: int, step: int, settings: BatchSettings, sizes: Sequence[int], rank: int, ranks: int
) -> list[int]:
    """Indices of the items of update `step` that this rank of so many runs; `sizes` are the items' tokens."""
    batch = global_batch(count, step, settings)
    return [batch[place] for place in balance_by_tokens([sizes[index] for index in batch], ranks)[rank]]


def balance_by_tokens(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Shares of a global batch that are as equal in tokens as may be: one list of places, ascending, for each rank.

    The largest first, each to the rank that has the fewest tokens yet (of several the first); so a share is a pure function
    of the batch and the number of ranks. Where ranks outnumber items, some shares are empty.

    Args:
        sizes: tokens of each item.
        ranks: how many shares.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        poorest = tokens.index(min(tokens))
        shares[poorest].append(place)
        tokens[poorest] += sizes[place]
    return [sorted(share) for share in shares]
