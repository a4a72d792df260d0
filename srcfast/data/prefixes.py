"""Siblings that begin alike share their beginning: the same paths with fewer tokens."""

from __future__ import annotations

from itertools import groupby

import numpy as np

from srcfast.data.forest import Segment, Tree

LEAST_SAVED = 8  # tokens: what a further segment costs attention more than it saves


def share_prefixes(tree: Tree, least_saved: int = LEAST_SAVED) -> tuple[Tree, list[int]]:
    """The tree with what siblings begin with in a segment of its own above them, again and again.

    Every path spells the same tokens. Beam search's candidates begin with the same sentences; what a prompt says before
    each of them they share anyhow.

    Args:
        tree: whose segments below the root hold no image placeholder.
        least_saved: tokens that a shared beginning must save: its length, times its siblings but one.

    Returns:
        The new tree, depth first, and for each segment of `tree` the one of the new tree whose last token is its last.
    """
    tokens = [segment.tokens.tolist() for segment in tree.segments]
    children: list[list[int]] = [[] for _ in tokens]
    for index, segment in enumerate(tree.segments[1:], start=1):
        children[segment.parent].append(index)
    shared: list[Segment] = []
    ends = [0] * len(tokens)

    def add(part: list[int], parent: int) -> int:
        shared.append(Segment(np.array(part, dtype=np.int64), parent))
        return len(shared) - 1

    def end(index: int, segment: int) -> None:
        ends[index] = segment
        below = sorted(children[index], key=lambda child: tokens[child])
        place(below, 0, 0, segment)

    def place(members: list[int], start: int, alike: int, parent: int) -> None:
        """Siblings, sorted, that are alike up to `alike`; what lies before `start` is in `parent`'s path."""
        over = [index for index in members if len(tokens[index]) == alike]
        for index in over:
            end(index, add(tokens[index][start:], parent) if alike > start else parent)
        for _, group in groupby(members[len(over) :], key=lambda index: tokens[index][alike]):
            together = list(group)
            if len(together) == 1:
                end(together[0], add(tokens[together[0]][start:], parent))
                continue
            first, last = tokens[together[0]], tokens[together[-1]]  # the two that differ first
            common = alike
            while common < min(len(first), len(last)) and first[common] == last[common]:
                common += 1
            if (len(together) - 1) * (common - start) >= least_saved:
                place(together, common, common, add(first[start:common], parent))
            else:
                place(together, start, common, parent)

    end(0, add(tokens[0], -1))
    return Tree(tuple(shared), tree.images, tree.key), ends
