"""What attention's options say of each row, by literal values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from srcfast.attention.forest_attention import _takes, flash_takes
from srcfast.attention.options import CAUSAL, AttentionOptions
from srcfast.attention.query_blocks import query_blocks
from srcfast.attention.varlen_plan import varlen_plan
from srcfast.data.forest import Forest, Segment, Tree

FAR = 2**31 - 1
# prompt 0 1 2 -> {3 4 -> {5, 6 7}, 8}
FOREST = Forest.of(
    [Tree((Segment([1] * 3), Segment([1] * 2, 0), Segment([1], 1), Segment([1] * 2, 1), Segment([1], 0)))]
)


def test_calls_of_variable_length_are_told_how_many_tokens_lie_before() -> None:
    assert [AttentionOptions(window=window).left for window in (1, 4)] == [0, 3] and CAUSAL.left == -1


@pytest.mark.parametrize(
    ("options", "before", "behind"),
    [
        (CAUSAL, [FAR] * 6, [0] * 6),
        (AttentionOptions(window=2), [1] * 6, [0] * 6),
        (AttentionOptions(two_way=((1, 4),)), [FAR] * 6, [0, 2, 1, 0, 0, 0]),
        (AttentionOptions(window=2, two_way=((1, 4),)), [1] * 6, [0, 2, 1, 0, 0, 0]),
        (AttentionOptions(window=2, two_way=((1, 5),), beyond_window=True), [1, 1, 1, 2, 3, 1], [0, 3, 2, 1, 0, 0]),
    ],
)
def test_a_query_reaches_so_far(options: AttentionOptions, before: list[int], behind: list[int]) -> None:
    found = options.reach(6)
    assert [side.tolist() for side in found] == [before, behind]


def test_ranges_have_their_rows_and_their_longest() -> None:
    options = AttentionOptions(two_way=((1, 3), (5, 9)))
    assert options.two_way_rows.tolist() == [1, 2, 5, 6, 7, 8] and options.longest_range == 4
    assert CAUSAL.two_way_rows.tolist() == [] and CAUSAL.longest_range == 0
    assert options.touches(np.array([0, 2])) and not options.touches(np.array([0, 3, 4, 9]))


def test_a_window_counts_where_it_is_shorter_than_the_longest_path() -> None:
    assert FOREST.max_seqlen_k == 7
    assert AttentionOptions(window=6).within(FOREST).window == 6
    assert AttentionOptions(window=7).within(FOREST).window is None


def test_blocks_of_all_rows_and_of_some() -> None:
    whole = query_blocks(FOREST)
    assert [part.tolist() for part in (whole.ends, whole.lengths, whole.key_ends, whole.paths, whole.parents)] == [
        [3, 5, 6, 8, 9],
        [3, 2, 1, 2, 1],
        [3, 8, 14, 21, 25],
        [3, 5, 6, 7, 4],
        [-1, 2, 4, 4, 2],
    ]
    some = query_blocks(
        FOREST, torch.tensor([1, 3, 4, 5, 6, 8])
    )  # 3 and 4, then 5 and 6 follow each other in other segments
    assert [
        part.tolist() for part in (some.ends, some.lengths, some.key_ends, some.paths, some.in_segment, some.parents)
    ] == [
        [1, 3, 4, 5, 6],
        [1, 2, 1, 1, 1],
        [2, 8, 14, 20, 25],
        [2, 5, 6, 6, 4],
        [2, 2, 1, 1, 1],
        [-1, 2, 4, 4, 2],
    ]


def test_a_variable_length_plan_joins_what_follows_its_parent() -> None:
    plan = varlen_plan(FOREST)
    # Rows 0 to 5 are one chain; 6 7 and 8 begin below a branch.
    assert plan.cu_seqlens_q.tolist() == [0, 6, 8, 9] and plan.cu_seqlens_k.tolist() == [0, 6, 13, 17]
    assert (plan.max_seqlen_q, plan.max_seqlen_k) == (6, 7)
    assert plan.copies is not None
    assert plan.copies.index.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 6, 7, 0, 1, 2, 8]
    rows = varlen_plan(FOREST, torch.tensor([4, 7, 8]))
    assert rows.cu_seqlens_q.tolist() == [0, 1, 2, 3] and rows.cu_seqlens_k.tolist() == [0, 5, 12, 16]
    assert (rows.max_seqlen_q, rows.max_seqlen_k) == (1, 7)


@pytest.mark.parametrize(("rows", "takes"), [(3, True), (4, True), (5, False)])
def test_a_range_as_long_as_the_window_fits_a_call(rows: int, takes: bool) -> None:
    options = AttentionOptions(window=4, two_way=((0, rows),), beyond_window=True)
    assert _takes("flash_attn", None, options) == _takes("torch_varlen", None, options) == takes
    assert _takes("blocks", None, options) and not _takes("xformers", None, options)


@pytest.mark.parametrize(
    ("size", "capability", "takes"),
    [(256, (8, 0), True), (264, (9, 0), False), (100, (9, 0), False), (256, (7, 5), False), (208, (8, 6), False)],
)
def test_flash_attention_takes_heads_up_to_256(
    size: int, capability: tuple[int, int], takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query: Any = SimpleNamespace(shape=(5, 2, size), is_cuda=True, dtype=torch.bfloat16, device="cuda:0")
    assert flash_takes(query) == takes
