"""Trees, forests and packing."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from helpers.random_forests import leaf_paths, path_rows, trees
from hypothesis import given, settings
from hypothesis import strategies as st

from srcfast.data.forest import Forest, Segment, Tree, pack_sizes
from srcfast.errors import InputError


@settings(max_examples=25, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=5))
def test_positions_paths_and_keys_follow_from_the_trees(drawn: list[Tree]) -> None:
    forest = Forest.of(drawn)
    assert forest.num_tokens == sum(tree.num_tokens for tree in drawn) == len(forest.token_ids)
    assert forest.wasted_tokens == 0
    bounds_q, bounds_k = forest.cu_seqlens_q.tolist(), forest.cu_seqlens_k.tolist()
    paths, segment = iter(forest.paths()), 0
    for tree, starts in zip(drawn, forest.segment_start, strict=True):
        for path in leaf_paths(tree):
            rows = next(paths)
            assert torch.equal(rows, path_rows(tree, starts, path))
            assert forest.token_ids[rows].tolist() == np.concatenate([tree.segments[s].tokens for s in path]).tolist()
            assert forest.positions[rows].tolist() == list(range(len(rows)))
        for local, part in enumerate(tree.segments):
            assert bounds_q[segment] == starts[local]
            assert bounds_q[segment + 1] - bounds_q[segment] == part.tokens.size
            seen = forest.kv_index[bounds_k[segment] : bounds_k[segment + 1]]
            assert seen[-part.tokens.size :].tolist() == list(range(starts[local], starts[local] + part.tokens.size))
            segment += 1
    assert next(paths, None) is None
    assert forest.max_seqlen_q == forest.cu_seqlens_q.diff().max()
    assert forest.max_seqlen_k == forest.cu_seqlens_k.diff().max() == max(len(path) for path in forest.paths())


@settings(max_examples=25, deadline=None)
@given(trees(max_segments=6))
def test_target_rows_are_the_rows_before_on_the_path(tree: Tree) -> None:
    other = Tree((Segment(np.arange(3)),))
    forest = Forest.of([other, tree])
    for path in leaf_paths(tree):
        on_path = path_rows(tree, forest.segment_start[1], path)
        rows, targets = forest.target_rows(1, path)
        assert torch.equal(rows, on_path[:-1])
        assert torch.equal(targets, forest.token_ids[on_path[1:]])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    st.integers(40, 90),
    st.one_of(st.none(), st.integers(1, 5)),
)
def test_packing_keeps_all_within_budget_and_reports_waste(
    sizes: list[int], budget: int, max_trees: int | None
) -> None:
    given_trees = [Tree((Segment(np.full(size, i)),), key=i) for i, size in enumerate(sizes)]
    forests = Forest.pack(given_trees, budget, max_trees)
    assert sorted(i for forest in forests for i in forest.indices) == list(range(len(sizes)))
    for forest in forests:
        assert forest.num_tokens == sum(sizes[i] for i in forest.indices) <= budget
        assert forest.wasted_tokens == budget - forest.num_tokens
        assert max_trees is None or len(forest.trees) <= max_trees
        assert all(given_trees[i] is tree for i, tree in zip(forest.indices, forest.trees, strict=True))
    assert [forest.indices for forest in forests] == [f.indices for f in Forest.pack(given_trees, budget, max_trees)]
    if max_trees is None:
        # Best fit never opens a bin while another has room: at most one bin is half empty.
        assert sum(forest.num_tokens * 2 <= budget for forest in forests) <= 1


def test_each_item_goes_to_the_fullest_forest_that_still_takes_it() -> None:
    assert pack_sizes([60, 50, 40, 45, 5], 100) == [[0, 2], [1, 3, 4]]


def test_the_order_of_images_is_that_of_the_trees() -> None:
    first, second = Tree((Segment([1]),), ("b", "a")), Tree((Segment([1]), Segment([2], 0)), ("c",))
    assert Forest.of([second, first]).images == ("c", "b", "a")


def test_a_tree_larger_than_the_budget_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="sample 'scene-7'.*at most 10 tokens.*found 11"):
        Forest.pack([Tree((Segment(np.zeros(11)),), key="scene-7")], 10)


@pytest.mark.parametrize("parents", [[0], [-1, -1], [-1, 1], [-1, 2, 0]])
def test_segments_that_make_no_tree_are_refused(parents: list[int]) -> None:
    with pytest.raises(InputError, match="one root"):
        Tree(tuple(Segment([1], parent) for parent in parents))


@pytest.mark.parametrize("tokens", [[], [[1, 2]]])
def test_a_segment_without_a_row_of_tokens_is_refused(tokens: list) -> None:
    with pytest.raises(InputError, match="non-empty row"):
        Segment(np.array(tokens, dtype=np.int64))


def test_packing_is_quick_enough_for_thousands_of_trees_a_second() -> None:
    rng = np.random.default_rng(0)
    many = [
        Tree((Segment(rng.integers(0, 9, n)), Segment(rng.integers(0, 9, 31), 0))) for n in rng.integers(40, 200, 2000)
    ]
    began = time.process_time()
    Forest.pack(many, 8192)
    assert time.process_time() - began < 2.0  # measured 0.04 s
