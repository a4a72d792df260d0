"""Hypothesis strategies and helpers for random forests."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from srcfast.data.forest import Segment, Tree

VOCABULARY = 61


@st.composite
def trees(draw: st.DrawFn, max_segments: int = 7, max_depth: int = 4, max_tokens: int = 9) -> Tree:
    """Up to `max_segments` segments, at most `max_depth` deep, each after its parent in any order."""
    segments, depths = [Segment(draw_tokens(draw, max_tokens))], [1]
    for _ in range(draw(st.integers(0, max_segments - 1))):
        parent = draw(st.sampled_from([i for i, depth in enumerate(depths) if depth < max_depth]))
        segments.append(Segment(draw_tokens(draw, max_tokens), parent))
        depths.append(depths[parent] + 1)
    return Tree(tuple(segments), key=draw(st.integers(0, 999)))


def draw_tokens(draw: st.DrawFn, most: int) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(0, VOCABULARY, draw(st.integers(1, most)))


def leaf_paths(tree: Tree) -> list[list[int]]:
    """Segment indices of every root-to-leaf path, found by walking up from the leaves."""
    parents = {segment.parent for segment in tree.segments}
    paths = []
    for leaf in range(len(tree.segments)):
        if leaf not in parents:
            path, at = [], leaf
            while at >= 0:
                path.insert(0, at)
                at = tree.segments[at].parent
            paths.append(path)
    return paths


def path_rows(tree: Tree, starts: list[int], path: list[int]) -> torch.Tensor:
    """Rows of a path's tokens in the forest, from where its segments start."""
    return torch.cat([torch.arange(starts[s], starts[s] + tree.segments[s].tokens.size) for s in path])


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Ordinary causal attention of one sequence; q `[n, H, d]`, k and v `[n, Hkv, d]`."""
    repeats = q.shape[1] // k.shape[1]
    query, keys, values = (
        x.transpose(0, 1) for x in (q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))
    )
    scores = query @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
    future = torch.ones(q.shape[0], q.shape[0], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, float("-inf")).softmax(-1) @ values).transpose(0, 1)
