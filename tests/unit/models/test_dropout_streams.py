"""The keys of dropout against SplitMix64 written out, and by packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.plain_training import plain_keys
from helpers.seeds import fresh_rng

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.models.dropout_keys import dropout_keys, step_keys

# The first numbers of SplitMix64 from the state 1234567, as its authors' C code prints them.
PUBLISHED = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)


def tree(rows: int) -> Tree:
    return Tree((Segment(np.zeros(rows - 1, dtype=np.int64)), Segment(np.zeros(1, dtype=np.int64), 0)))


def test_the_generator_that_is_written_out_is_splitmix64() -> None:
    keys = plain_keys(0, 0, 0, len(PUBLISHED), state=1234567)
    assert [key % (1 << 64) for key in keys.tolist()] == list(PUBLISHED)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (3, 0), (3, 17), (2**31, 2**20)])
def test_a_row_s_key_follows_from_seed_step_position_and_its_place_in_the_tree(seed: int, step: int) -> None:
    sizes, positions = (5, 2, 9), [4, 0, 11]
    forest = Forest.of([tree(size) for size in sizes])
    expected = [plain_keys(seed, step, position, size) for position, size in zip(positions, sizes, strict=True)]
    assert torch.equal(dropout_keys(forest, seed, step, positions), torch.cat(expected))
    assert len(set(torch.cat(expected).tolist())) == sum(sizes)


def test_a_rank_s_forests_take_the_positions_of_their_items_in_the_global_batch() -> None:
    sizes = fresh_rng().integers(2, 9, 6).tolist()
    positions = [7, 1, 4, 0, 9, 3]
    keys_of = step_keys(5, 2, positions)
    for forest in Forest.pack([tree(size) for size in sizes], 20, max_trees=2):
        expected = [plain_keys(5, 2, positions[index], sizes[index]) for index in forest.indices]
        assert torch.equal(keys_of(forest), torch.cat(expected))
