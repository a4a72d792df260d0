"""Select the items of a training step, and split them across ranks: pure functions of seed and step."""

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


@lru_cache(maxsize=2)  # called at each step of an epoch; loader workers are at most one epoch ahead
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation `[count]` of the items in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def num_steps(count: int, settings: BatchSettings) -> int:
    """Return the number of updates of all epochs over `count` items; an epoch's last global batch may be smaller."""
    return settings.epochs * math.ceil(count / settings.global_batch_size)


class TrainingLength(BatchSettings, Protocol):
    """Settings that say how long a training is."""

    @property
    def updates(self) -> int: ...


def num_updates(count: int, settings: TrainingLength) -> int:
    """Return the number of updates of a training on `count` items: the one that is set, or that of all epochs."""
    return settings.updates or num_steps(count, settings)


def global_batch(count: int, step: int, settings: BatchSettings) -> list[int]:
    """Return the indices of the items of update `step`."""
    epoch, within = divmod(step, math.ceil(count / settings.global_batch_size))
    begin = within * settings.global_batch_size
    return epoch_order(count, settings.seed, epoch)[begin : begin + settings.global_batch_size].tolist()


def rank_batch_indices(
    count: int, step: int, settings: BatchSettings, sizes: Sequence[int], rank: int, ranks: int
) -> list[int]:
    """Return the indices of the items of update `step` that a rank runs; `sizes` are the items' tokens."""
    batch = global_batch(count, step, settings)
    positions = balance_by_tokens([sizes[index] for index in batch], ranks)[rank]
    return [batch[position] for position in positions]


def balance_by_tokens(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Split a global batch across ranks with about equal numbers of tokens.

    Greedy: the largest item first, each to the rank with the fewest tokens so far, to the first of several. So the split is a
    pure function of the batch and the number of ranks.

    Args:
        sizes: tokens of each item.
        ranks: number of ranks.

    Returns:
        For each rank the positions of its items in `sizes`, ascending; empty for some where ranks outnumber items.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for position in sorted(range(len(sizes)), key=lambda position: (-sizes[position], position)):
        least_loaded = tokens.index(min(tokens))
        shares[least_loaded].append(position)
        tokens[least_loaded] += sizes[position]
    return [sorted(share) for share in shares]
