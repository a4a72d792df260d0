"""The blocks of a forest's one variable-length call: chains of first children, each with the path of its last segment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.random_forests import path_rows, trees
from hypothesis import given, settings
from hypothesis import strategies as st

from srcfast.attention.forest_attention import forest_attention
from srcfast.attention.varlen_plan import varlen_plan
from srcfast.data.forest import Forest, Segment, Tree
from srcfast_kernels.backends import use_backend


def tree(*segments: tuple[int, int]) -> Tree:
    """Of (length, parent)."""
    return Tree(tuple(Segment(np.arange(length), parent) for length, parent in segments))


@settings(max_examples=50, deadline=None)
@given(st.lists(trees(max_segments=9, max_depth=6), min_size=1, max_size=4))
def test_blocks_are_chains_and_their_keys_the_chains_paths(drawn: list[Tree]) -> None:
    forest = Forest.of(drawn)
    plan = varlen_plan(forest)
    expected = []  # (first row, end, rows of the keys)
    for part, starts in zip(drawn, forest.segment_start, strict=True):
        for local, segment in enumerate(part.segments):
            path = [local]
            while part.segments[path[0]].parent >= 0:
                path.insert(0, part.segments[path[0]].parent)
            begin = starts[local]
            if segment.parent == local - 1 and local > 0:
                begin = expected.pop()[0]
            expected.append((begin, starts[local] + segment.tokens.size, path_rows(part, starts, path).tolist()))
    index = torch.arange(forest.num_tokens) if plan.copies is None else plan.copies.index
    bounds_q, bounds_k = plan.cu_seqlens_q.tolist(), plan.cu_seqlens_k.tolist()
    assert bounds_q == [0, *(end for _, end, _ in expected)]
    for block, (begin, end, rows) in enumerate(expected):
        assert (bounds_q[block], bounds_q[block + 1]) == (begin, end)
        assert index[bounds_k[block] : bounds_k[block + 1]].tolist() == rows
    assert len(index) == bounds_k[-1]
    assert plan.max_seqlen_q == max(end - begin for begin, end, _ in expected)
    assert plan.max_seqlen_k == max(len(rows) for _, _, rows in expected) == forest.max_seqlen_k
    assert plan.cu_seqlens_q.dtype == plan.cu_seqlens_k.dtype == torch.int32


def test_without_branches_nothing_is_copied_and_the_bounds_are_still_two_tensors() -> None:
    forest = Forest.of([tree((5, -1)), tree((3, -1), (2, 0), (4, 1)), tree((1, -1), (1, 0))])
    plan = varlen_plan(forest)
    k, v = torch.randn(forest.num_tokens, 2, 4), torch.randn(forest.num_tokens, 2, 4)
    keys, values = plan.gather(k, v)
    assert plan.copies is None and keys is k and values is v
    assert plan.cu_seqlens_q.tolist() == plan.cu_seqlens_k.tolist() == [0, 5, 14, 16]
    assert plan.cu_seqlens_q is not plan.cu_seqlens_k
    assert plan.cu_seqlens_q.data_ptr() != plan.cu_seqlens_k.data_ptr()


@pytest.mark.parametrize(
    ("children", "by_segment", "by_chain"), [(1, 1472, 832), (2, 2304, 1664), (4, 3968, 3328), (8, 7296, 6656)]
)
def test_the_first_child_spares_a_copy_of_the_prompt(children: int, by_segment: int, by_chain: int) -> None:
    forest = Forest.of([tree((640, -1), *[(192, 0)] * children)])
    assert len(forest.kv_index) == by_segment
    assert varlen_plan(forest).cu_seqlens_k[-1] == by_chain


def test_a_moved_forest_s_plan_is_made_on_the_host_and_once() -> None:
    forest = Forest.of([tree((5, -1), (3, 0), (2, 0))])
    moved = forest.to("meta")  # a device whose numbers can't be read
    plan = varlen_plan(moved)
    assert plan is varlen_plan(moved)
    assert plan.cu_seqlens_q.device.type == "meta" and plan.cu_seqlens_q.shape == (3,)
    assert plan.copies is not None and plan.copies.index.shape == (15,)
    assert varlen_plan(forest).cu_seqlens_k.tolist() == [0, 8, 15]


def test_attention_over_keys_that_triton_gathered_is_the_dense_reference_s() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forest = Forest.of([tree((5, -1), (3, 0), (2, 1), (4, 1), (2, 0)), tree((2, -1))]).to(device)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(forest.num_tokens, heads, 4, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        for heads in (4, 2, 2)
    )
    results = []
    for backend in ("varlen_reference", "reference"):
        with use_backend("triton"):
            output = forest_attention(q, k, v, forest, backend)
            results.append((output, *torch.autograd.grad(output.square().sum(), (q, k, v))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
