"""Merge the common prefixes of sibling segments: the same paths with fewer tokens."""

from __future__ import annotations

from itertools import groupby

import numpy as np

from srcfast.data.forest import Segment, Tree

MIN_SAVED = 8  # tokens: for fewer, the additional segment costs attention more than the tokens it saves


def share_prefixes(tree: Tree, min_saved: int = MIN_SAVED) -> tuple[Tree, list[int]]:
    """Move common prefixes of siblings into new segments above them, recursively.

    Every path has the same tokens as before. Beam search's candidates, for instance, begin with the same sentences.

    Args:
        tree: its segments below the root must hold no image placeholder.
        min_saved: minimal tokens that a shared prefix saves: its length times (its siblings - 1).

    Returns:
        The new tree, depth first, and for each segment of `tree` the index of the new tree's segment that ends with its last
        token.
    """
    tokens = [segment.tokens.tolist() for segment in tree.segments]
    children: list[list[int]] = [[] for _ in tokens]
    for index, segment in enumerate(tree.segments[1:], start=1):
        children[segment.parent].append(index)
    shared: list[Segment] = []
    ends = [0] * len(tokens)

    def add(segment_tokens: list[int], parent: int) -> int:
        shared.append(Segment(np.array(segment_tokens, dtype=np.int64), parent))
        return len(shared) - 1

    def end(index: int, segment: int) -> None:
        """Record that a segment of `tree` ends with a new segment, and continue with its children."""
        ends[index] = segment
        add_siblings(sorted(children[index], key=lambda child: tokens[child]), 0, 0, segment)

    def add_siblings(siblings: list[int], start: int, equal: int, parent: int) -> None:
        """Add siblings, sorted, whose first `equal` tokens are equal; those before `start` are in the path of `parent`."""
        finished = [index for index in siblings if len(tokens[index]) == equal]
        for index in finished:
            end(index, add(tokens[index][start:], parent) if equal > start else parent)
        for _, group in groupby(siblings[len(finished) :], key=lambda index: tokens[index][equal]):
            members = list(group)
            first, last = tokens[members[0]], tokens[members[-1]]
            if len(members) == 1:
                end(members[0], add(first[start:], parent))
                continue
            common = equal  # sorted: a prefix of the first and the last is one of all
            while common < min(len(first), len(last)) and first[common] == last[common]:
                common += 1
            if (len(members) - 1) * (common - start) >= min_saved:
                add_siblings(members, common, common, add(first[start:common], parent))
            else:
                add_siblings(members, start, common, parent)

    end(0, add(tokens[0], -1))
    return Tree(tuple(shared), tree.images, tree.key), ends
