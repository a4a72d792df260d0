"""From a judge's hidden states at its verdict slots to scores and confidences of all candidates.

    p_ij = sum_k value_k softmax_k(verdict logits)      candidate i shown first, j second
    q_ij = (p_ij + 1 - p_ji) / 2                        the order's bias cancelled
    u_ij = |2 q_ij - 1| (1 - |p_ij + p_ji - 1|)         0 for a neutral verdict and for one that flips with the order
    S_i  = sum_j u_ij q_ij / sum_j u_ij                 1/2 where the sum is 0

"Our reading" of SRC (arXiv 2509.13919), an implementation of its abstract.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class VerdictOutput(NamedTuple):
    """q [N, N] (1/2 on the diagonal and where a pair is missing), S [N], u [N, N]; with a leading [S] if batched."""

    win_probability: Tensor
    scores: Tensor
    confidence: Tensor


def pairwise_verdict(
    hidden: Tensor,
    verdict_weight: Tensor,
    first: Tensor,
    second: Tensor,
    num_candidates: int | Tensor,
    *,
    verdict_values: Tensor,
    sample_ids: Tensor | None = None,
) -> VerdictOutput:
    """Aggregate M ordered comparisons.

    Args:
        hidden: [M, D] at the verdict slots.
        verdict_weight: [K, D], the head's rows of the verdict tokens.
        first, second: [M] int64, which candidates were shown first and second; each ordered pair at most once a sample.
        num_candidates: N. With `sample_ids`: the largest N of the batch, or each sample's [S]; only the latter counts
            samples after the last that was judged. Candidates beyond a sample's own score 1/2 with confidence 0.
        verdict_values: [K] what each verdict counts as a win of the first: 1, 1/2 (tie), 0.
        sample_ids: [M] int64 for several samples at once; outputs then lead with the number of samples S.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ verdict_weight.to(dtype).T  # [M, K]
    wins = logits.softmax(-1) @ verdict_values.to(dtype)  # [M]
    sample = torch.zeros_like(first) if sample_ids is None else sample_ids
    if isinstance(num_candidates, Tensor):
        samples, largest = len(num_candidates), int(num_candidates.max())
    else:
        samples, largest = 1 if sample_ids is None else int(sample_ids.max()) + 1, num_candidates
    p = wins.new_zeros(samples, largest, largest)
    p[sample, first, second] = wins
    judged = torch.zeros_like(p, dtype=torch.bool)
    judged[sample, first, second] = True
    both = judged & judged.mT  # a pair counts when both of its orders were judged
    q = (0.5 * (p + 1.0 - p.mT)).where(both, 0.5)
    u = ((2.0 * q - 1.0).abs() * (1.0 - (p + p.mT - 1.0).abs())).where(both, 0.0)
    total = u.sum(-1)
    scores = ((u * q).sum(-1) / total).where(total != 0.0, 0.5)
    if sample_ids is None:
        return VerdictOutput(q[0], scores[0], u[0])
    return VerdictOutput(q, scores, u)


def pairwise_verdict_reference(
    hidden: Tensor,
    verdict_weight: Tensor,
    first: Tensor,
    second: Tensor,
    num_candidates: int,
    *,
    verdict_values: Tensor,
) -> VerdictOutput:
    """One sample, pair by pair, as the formulas read."""
    logits = hidden.double() @ verdict_weight.double().T
    p = {
        (i, j): float(row.softmax(-1) @ verdict_values.double())
        for i, j, row in zip(first.tolist(), second.tolist(), logits, strict=True)
    }
    q = torch.full((num_candidates, num_candidates), 0.5, dtype=torch.float64)
    u = torch.zeros_like(q)
    for (i, j), forward in p.items():
        if (j, i) in p and i != j:
            q[i, j] = 0.5 * (forward + 1.0 - p[j, i])
            u[i, j] = abs(2.0 * float(q[i, j]) - 1.0) * (1.0 - abs(forward + p[j, i] - 1.0))
    scores = torch.tensor(
        [float((u[i] * q[i]).sum() / u[i].sum()) if float(u[i].sum()) > 0 else 0.5 for i in range(num_candidates)],
        dtype=torch.float64,
    )
    return VerdictOutput(q, scores, u)
