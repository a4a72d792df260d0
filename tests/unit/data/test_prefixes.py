"""Siblings that begin alike share their beginning: the same paths, fewer tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from srcfast.data.forest import Segment, Tree
from srcfast.data.prefixes import share_prefixes


@st.composite
def alike_trees(draw: st.DrawFn) -> Tree:
    """Trees over two tokens, in which siblings often begin alike, are equal, or are another's beginning."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 12))
    parents = [-1, *(int(rng.integers(0, index)) for index in range(1, count))]
    return Tree(tuple(Segment(rng.integers(0, 2, rng.integers(1, 9)), parent) for parent in parents), key="t")


def path(tree: Tree, segment: int) -> list[int]:
    """Tokens from the root to the segment's end."""
    tokens: list[int] = []
    while segment != -1:
        tokens = [*tree.segments[segment].tokens.tolist(), *tokens]
        segment = tree.segments[segment].parent
    return tokens


@settings(max_examples=150, deadline=None)
@given(tree=alike_trees(), least=st.sampled_from([1, 3, 8]))
def test_every_segment_ends_where_its_path_spells_the_same_tokens(tree: Tree, least: int) -> None:
    shared, ends = share_prefixes(tree, least)
    assert shared.key == "t" and shared.num_tokens <= tree.num_tokens
    for segment, end in enumerate(ends):
        assert path(shared, end) == path(tree, segment)
    # Nothing is there that no segment needs: every new segment lies on the way to some end.
    needed = set()
    for end in ends:
        while end != -1:
            needed.add(end)
            end = shared.segments[end].parent
    assert needed == set(range(len(shared.segments)))


@settings(max_examples=100, deadline=None)
@given(tree=alike_trees())
def test_sharing_all_leaves_one_token_for_each_beginning(tree: Tree) -> None:
    shared, _ = share_prefixes(tree, min_saved=1)
    children: dict[int, list[int]] = {}
    for segment in shared.segments[1:]:
        children.setdefault(segment.parent, []).append(int(segment.tokens[0]))
    # Siblings of different old parents that meet in one new parent are compared by their own parent only.
    if len({segment.parent for segment in tree.segments}) <= 2:  # a root and its children
        assert all(len(set(first)) == len(first) for first in children.values())
        beginnings = {
            tuple(path(tree, i)[: n + 1]) for i in range(len(tree.segments)) for n in range(len(path(tree, i)))
        }
        assert shared.num_tokens == len(beginnings)


def test_a_beginning_is_shared_where_it_saves_enough_and_within_one_that_does_not() -> None:
    tree = Tree((Segment([9]), Segment([1, 2, 3, 4, 5, 6], 0), Segment([1, 2, 3, 4, 5, 7], 0), Segment([1, 8], 0)))
    shared, ends = share_prefixes(tree, min_saved=5)
    spelled = [(segment.tokens.tolist(), segment.parent) for segment in shared.segments]
    # The three share one token, which would save two; two of them share five, which saves five.
    assert spelled == [([9], -1), ([1, 2, 3, 4, 5], 0), ([6], 1), ([7], 1), ([1, 8], 0)]
    assert ends == [0, 2, 3, 4]


def test_equal_segments_and_beginnings_of_others_need_no_token_of_their_own() -> None:
    tree = Tree((Segment([9]), Segment([1, 2], 0), Segment([1, 2], 0), Segment([1, 2, 3], 0), Segment([4], 2)))
    shared, ends = share_prefixes(tree, min_saved=1)
    assert [(s.tokens.tolist(), s.parent) for s in shared.segments] == [([9], -1), ([1, 2], 0), ([4], 1), ([3], 1)]
    assert ends == [0, 1, 1, 3, 2]
