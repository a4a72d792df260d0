"""Verdicts to scores and confidences, against the formulas pair by pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srcfast_kernels import pairwise_verdict
from srcfast_kernels.backends import use_backend
from srcfast_kernels.pairwise_verdict import pairwise_verdict_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VALUES = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)


def comparisons(count: int, seed: int, kept: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [M, D], verdict weight [3, D], first [M], second [M] in a random order; a share of pairs is missing."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.tensor([(i, j) for i in range(count) for j in range(count) if i != j])
    both = both[torch.randperm(len(both), generator=generator)]
    both = both[: max(1, round(kept * len(both)))]
    hidden = torch.randn(len(both), 5, generator=generator, dtype=torch.float64)
    return hidden, torch.randn(3, 5, generator=generator, dtype=torch.float64), both[:, 0], both[:, 1]


@given(
    count=st.integers(2, 12),
    seed=st.integers(0, 99),
    kept=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    softcap=st.sampled_from([None, 0.5, 3.0]),
)
@settings(max_examples=30, deadline=None)
def test_it_equals_the_reference(count: int, seed: int, kept: float, softcap: float | None) -> None:
    hidden, weight, first, second = comparisons(count, seed, kept)
    options = {"verdict_values": VALUES, "softcap": softcap}
    ours = pairwise_verdict(hidden, weight, first, second, count, **options)
    theirs = pairwise_verdict_reference(hidden, weight, first, second, count, **options)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)  # fp64


def test_it_equals_the_reference_for_many_candidates() -> None:
    hidden, weight, first, second = comparisons(64, 1)
    ours = pairwise_verdict(hidden, weight, first, second, 64, verdict_values=VALUES)
    theirs = pairwise_verdict_reference(hidden, weight, first, second, 64, verdict_values=VALUES)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-12, atol=1e-13)


@given(count=st.integers(2, 9), seed=st.integers(0, 99), kept=st.sampled_from([0.5, 1.0]))
@settings(max_examples=20, deadline=None)
def test_bounds_and_antisymmetry(count: int, seed: int, kept: float) -> None:
    q, scores, u = pairwise_verdict(*comparisons(count, seed, kept), count, verdict_values=VALUES)
    torch.testing.assert_close(q + q.mT, torch.ones_like(q))
    torch.testing.assert_close(u, u.mT)
    for value in (q, scores, u):
        assert 0.0 <= float(value.min()) and float(value.max()) <= 1.0
    assert not u.diagonal().any() and bool((q.diagonal() == 0.5).all())


def test_a_batch_is_its_samples_one_by_one() -> None:
    """Samples of different sizes: those with fewer candidates leave the rest neutral."""
    counts = [3, 5, 2]
    parts = [comparisons(count, seed) for seed, count in enumerate(counts)]
    weight = parts[0][1]
    ids = torch.cat([torch.full((len(part[0]),), sample) for sample, part in enumerate(parts)])
    hidden, first, second = (torch.cat([part[k] for part in parts]) for k in (0, 2, 3))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    batched = pairwise_verdict(
        hidden[order], weight, first[order], second[order], 5, verdict_values=VALUES, sample_ids=ids[order]
    )
    for sample, (count, part) in enumerate(zip(counts, parts, strict=True)):
        single = pairwise_verdict(part[0], weight, part[2], part[3], count, verdict_values=VALUES)
        torch.testing.assert_close(batched.win_probability[sample, :count, :count], single.win_probability)
        torch.testing.assert_close(batched.confidence[sample, :count, :count], single.confidence)
        torch.testing.assert_close(batched.scores[sample, :count], single.scores)
        assert bool((batched.scores[sample, count:] == 0.5).all())


def test_samples_that_nobody_judged_are_neutral_wherever_they_stand() -> None:
    hidden, weight, first, second = comparisons(3, 7)
    sizes = torch.tensor([1, 3, 2, 0])
    output = pairwise_verdict(
        hidden, weight, first, second, sizes, verdict_values=VALUES, sample_ids=torch.ones_like(first)
    )
    alone = pairwise_verdict(hidden, weight, first, second, 3, verdict_values=VALUES)
    assert output.scores.shape == (4, 3)
    torch.testing.assert_close(output.scores[1], alone.scores)
    assert bool((output.scores[[0, 2, 3]] == 0.5).all()) and not output.confidence[[0, 2, 3]].any()
    none = torch.zeros(0, dtype=torch.int64)
    empty = pairwise_verdict(hidden[:0], weight, none, none, sizes, verdict_values=VALUES, sample_ids=none)
    assert bool((empty.win_probability == 0.5).all()) and empty.scores.shape == (4, 3)


def test_a_broken_verdict_is_seen_and_not_taken_for_a_missing_one() -> None:
    hidden, weight, first, second = comparisons(3, 8)
    hidden[(first == 0) & (second == 1)] = float("nan")
    output = pairwise_verdict(hidden, weight, first, second, 3, verdict_values=VALUES)
    assert output.scores.isnan().tolist() == [True, True, False]


def verdicts(rows: dict[tuple[int, int], int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Certain verdicts: index into VALUES for each ordered pair."""
    first, second = torch.tensor(list(rows)).T
    hidden = 200.0 * torch.eye(3, dtype=torch.float64)[torch.tensor(list(rows.values()))]
    return pairwise_verdict(hidden, torch.eye(3, dtype=torch.float64), first, second, count, verdict_values=VALUES)


def test_certain_verdicts_give_certain_scores() -> None:
    q, scores, u = verdicts({(0, 1): 0, (1, 0): 2}, 2)
    assert scores.tolist() == [1.0, 0.0] and float(u[0, 1]) == 1.0 and float(q[0, 1]) == 1.0


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("distance", [1e-4, 1e-7])
def test_nearly_neutral_verdicts_weigh_by_their_shares_however_small_their_sum(distance: float, backend: str) -> None:
    """Candidate 0 is judged better than 1 by d and than 2 by 3 d: q = 1/2 + d, u = 2 d, S_0 = 1/2 + (1 + 9) d / 4."""
    better = {(0, 1): distance, (1, 0): -distance, (0, 2): 3 * distance, (2, 0): -3 * distance}
    wins = 0.5 + torch.tensor(list(better.values()), dtype=torch.float64, device=DEVICE)
    logits = torch.stack([wins, 1e-30 * wins, 1.0 - wins], 1).log()  # [4, 3], no ties
    first, second = torch.tensor(list(better), device=DEVICE).T
    with use_backend(backend):
        q, scores, u = pairwise_verdict(
            logits, torch.eye(3, dtype=torch.float64, device=DEVICE), first, second, 3, verdict_values=VALUES.to(DEVICE)
        )
    # fp64 rounds p to 1e-16, so that the shares of confidences of 1e-7 are known to 1e-9.
    expected = [0.5 + 2.5 * distance, 0.5 - distance, 0.5 - 3 * distance]
    assert scores.tolist() == pytest.approx(expected, rel=0, abs=1e-14)
    assert u[0].tolist() == pytest.approx([0.0, 2 * distance, 6 * distance], rel=1e-8)
    assert q[0].tolist() == pytest.approx([0.5, 0.5 + distance, 0.5 + 3 * distance], rel=0, abs=1e-15)


@pytest.mark.parametrize("both", [(1, 1), (0, 0), (2, 2)], ids=["ties", "the first always", "the second always"])
def test_ties_and_verdicts_that_flip_with_the_order_say_nothing(both: tuple[int, int]) -> None:
    q, scores, u = verdicts({(0, 1): both[0], (1, 0): both[1]}, 2)
    assert not u.any() and bool((q == 0.5).all()) and bool((scores == 0.5).all())


def test_a_pair_judged_in_one_order_only_is_left_out() -> None:
    q, scores, u = verdicts({(0, 1): 0, (1, 0): 2, (2, 0): 0, (1, 2): 1}, 3)
    assert u[2].tolist() == [0.0, 0.0, 0.0] and q[2].tolist() == [0.5, 0.5, 0.5]
    assert scores.tolist() == [1.0, 0.0, 0.5]


def test_bf16_states_are_judged_in_fp32() -> None:
    hidden, weight, first, second = comparisons(6, 3)
    narrow = pairwise_verdict(hidden.bfloat16(), weight.bfloat16(), first, second, 6, verdict_values=VALUES)
    exact = pairwise_verdict(
        hidden.bfloat16().double(), weight.bfloat16().double(), first, second, 6, verdict_values=VALUES
    )
    assert narrow.scores.dtype == torch.float32
    torch.testing.assert_close(narrow.scores.double(), exact.scores, rtol=1e-5, atol=1e-5)


def test_no_comparisons_are_no_samples_or_neutral_ones() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    own = {"verdict_values": VALUES, "sample_ids": none}
    nobody = pairwise_verdict(torch.zeros(0, 4), torch.randn(3, 4), none, none, 5, **own)
    assert [part.shape for part in nobody] == [(0, 5, 5), (0, 5), (0, 5, 5)]
    two = pairwise_verdict(torch.zeros(0, 4), torch.randn(3, 4), none, none, torch.tensor([2, 3]), **own)
    assert two.scores.tolist() == [[0.5] * 3] * 2 and not two.confidence.any()
    one = pairwise_verdict(torch.zeros(0, 4), torch.randn(3, 4), none, none, torch.tensor(2), verdict_values=VALUES)
    assert one.scores.tolist() == [0.5, 0.5]
