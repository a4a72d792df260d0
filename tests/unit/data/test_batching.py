"""Which items a step takes, how ranks share them, how they are packed: by literal values, ties on purpose."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from srcfast.data.batching import balance_by_tokens, epoch_order, global_batch, num_steps, rank_batch_indices
from srcfast.data.forest import pack_sizes
from srcfast_kernels import native


def settings(epochs: int = 1, size: int = 4, seed: int = 0) -> SimpleNamespace:
    return SimpleNamespace(epochs=epochs, global_batch_size=size, seed=seed)


@pytest.mark.parametrize(
    ("count", "epochs", "size", "steps"), [(8, 1, 4, 2), (9, 1, 4, 3), (9, 2, 4, 6), (1, 5, 4, 5), (4, 3, 5, 3)]
)
def test_an_epoch_ends_with_a_smaller_batch(count: int, epochs: int, size: int, steps: int) -> None:
    loop = settings(epochs, size)
    assert num_steps(count, loop) == steps
    sizes = [len(global_batch(count, step, loop)) for step in range(steps)]
    rest = count % size or size
    assert sizes == ([size] * (steps // epochs - 1) + [rest]) * epochs


def test_the_order_of_an_epoch_is_numpy_s_permutation_of_seed_and_epoch() -> None:
    for epoch in range(3):
        expected = np.random.default_rng((7, epoch)).permutation(11).tolist()
        assert epoch_order(11, 7, epoch).tolist() == expected
        taken = [global_batch(11, 3 * epoch + step, settings(3, 4, 7)) for step in range(3)]
        assert [taken[0], taken[1], taken[2]] == [expected[:4], expected[4:8], expected[8:]]
    orders = {tuple(epoch_order(11, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6


@pytest.mark.parametrize(
    ("sizes", "ranks", "shares"),
    [
        ([10, 1, 1, 1, 1, 1], 2, [[0], [1, 2, 3, 4, 5]]),  # by tokens, not by number
        ([5, 5, 5, 5], 2, [[0, 2], [1, 3]]),  # of equal items the first, to the first of equal ranks
        ([3, 9, 3, 9, 3], 2, [[0, 1, 4], [2, 3]]),
        ([2, 2], 3, [[0], [1], []]),
        ([7, 4, 4, 3, 2], 3, [[0], [1, 3], [2, 4]]),
    ],
)
def test_ranks_share_a_batch_by_tokens(sizes: list[int], ranks: int, shares: list[list[int]]) -> None:
    assert balance_by_tokens(sizes, ranks) == shares
    loop = settings(1, len(sizes), 5)
    order = np.random.default_rng((5, 0)).permutation(len(sizes)).tolist()
    of_item = {item: sizes[position] for position, item in enumerate(order)}
    given = [of_item[item] for item in range(len(sizes))]
    for rank in range(ranks):
        expected = [order[position] for position in shares[rank]]
        assert rank_batch_indices(len(sizes), 0, loop, given, rank, ranks) == expected


PACKED = [
    ([60, 50, 40, 45, 5], 100, None, [[0, 2], [1, 3, 4]]),
    ([6, 4, 5, 5], 10, None, [[0, 1], [2, 3]]),  # what fits exactly is put there
    ([3, 3, 3, 3], 9, None, [[0, 1, 2], [3]]),  # of equal items the first
    ([1, 1, 1, 1, 1], 9, 2, [[0, 1], [2, 3], [4]]),
    ([7, 6, 3, 2], 10, None, [[0, 2], [1, 3]]),  # the fullest bin that has room
    ([9, 9, 1, 1], 10, 2, [[0, 2], [1, 3]]),
]


@pytest.mark.parametrize(("sizes", "budget", "most", "bins"), PACKED)
def test_packing_is_best_fit_decreasing(
    sizes: list[int], budget: int, most: int | None, bins: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pack_sizes(sizes, budget, most) == bins
    if native.available():
        monkeypatch.setattr("srcfast.data.forest.NATIVE_FROM", 1)
        assert pack_sizes(sizes, budget, most) == bins
