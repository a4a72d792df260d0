"""Compute scores and confidences of all candidates from a judge's hidden states at its verdict slots.

    p_ij = sum_k value_k softmax_k(verdict logits)      candidate i shown first, j second
    q_ij = (p_ij + 1 - p_ji) / 2                        the order's bias cancelled
    u_ij = |2 q_ij - 1| (1 - |p_ij + p_ji - 1|)         0 for a neutral verdict and for one that flips with the order
    S_i  = sum_j u_ij q_ij / sum_j u_ij                 1/2 where the sum is 0

"Our reading" of SRC (arXiv 2509.13919), an implementation of its abstract.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from srcfast_kernels.backends import accumulator, backend_for

# One program has a sample to itself, and few samples fill no GPU: what counts is how few loads wait for one another.
LAUNCH = {"BLOCK_PAIRS": 8, "BLOCK_HIDDEN": 256, "BLOCK_SCAN": 1024, "num_warps": 8}


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
    num_samples: int | None = None,
    softcap: float | None = None,
) -> VerdictOutput:
    """Aggregate M ordered comparisons.

    Args:
        hidden: [M, D] at the verdict slots.
        verdict_weight: [K, D], the head's rows of the verdict tokens.
        first, second: [M] int64, which candidates were shown first and second; each ordered pair at most once a sample.
        num_candidates: N. With `sample_ids`: the largest N of the batch, or each sample's [S]; only the latter counts
            samples after the last that was judged. Candidates beyond those of a sample score 1/2 with confidence 0.
        verdict_values: [K] what each verdict counts as a win of the first: 1, 1/2 (tie), 0.
        sample_ids: [M] int64 for several samples at once; outputs then lead with the number of samples S.
        num_samples: S, where N is a number: a GPU then need not be waited for to learn it.
        softcap: logits x become c tanh(x / c); None: they don't.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    samples, largest = _batch(num_candidates, sample_ids, num_samples)
    if len(first) and backend_for(hidden) == "triton":
        return _pairwise_verdict_triton(
            hidden, verdict_weight, first, second, verdict_values.to(dtype), sample_ids, samples, largest, softcap
        )
    logits = hidden.to(dtype) @ verdict_weight.to(dtype).T  # [M, K]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wins = logits.softmax(-1) @ verdict_values.to(dtype)  # [M]
    sample = torch.zeros_like(first) if sample_ids is None else sample_ids
    p = wins.new_zeros(samples, largest, largest)
    p[sample, first, second] = wins
    judged = torch.zeros_like(p, dtype=torch.bool)
    judged[sample, first, second] = True
    output = verdict_scores(p, judged)
    return output if sample_ids is not None else VerdictOutput(*(tensor[0] for tensor in output))


def verdict_scores(p: Tensor, judged: Tensor) -> VerdictOutput:
    """Compute q, S and u from the wins of whoever was shown first.

    Args:
        p: [..., N, N], p_ij the share of a win of i, shown before j.
        judged: [..., N, N] bool, which ordered pairs were judged; a pair counts when both of its orders were.
    """
    both = judged & judged.mT
    q = (0.5 * (p + 1.0 - p.mT)).where(both, 0.5)
    u = ((2.0 * q - 1.0).abs() * (1.0 - (p + p.mT - 1.0).abs())).where(both, 0.0)
    total = u.sum(-1)
    scores = ((u * q).sum(-1) / total).where(total != 0.0, 0.5)
    return VerdictOutput(q, scores, u)


def _batch(num_candidates: int | Tensor, sample_ids: Tensor | None, num_samples: int | None) -> tuple[int, int]:
    """Return the number of samples, and the largest number of candidates."""
    if isinstance(num_candidates, Tensor) and num_candidates.ndim == 1:
        return len(num_candidates), int(num_candidates.max())
    if num_samples is None:
        num_samples = 1
        if sample_ids is not None:
            num_samples = int(sample_ids.max()) + 1 if len(sample_ids) else 0
    return num_samples, int(num_candidates)


def pairwise_verdict_reference(
    hidden: Tensor,
    verdict_weight: Tensor,
    first: Tensor,
    second: Tensor,
    num_candidates: int,
    *,
    verdict_values: Tensor,
    softcap: float | None = None,
) -> VerdictOutput:
    """Compute one sample, pair by pair, as the formulas read."""
    logits = hidden.double() @ verdict_weight.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
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


@triton.jit
def pairwise_verdict_kernel(
    hidden_ptr,
    weight_ptr,
    values_ptr,
    first_ptr,
    second_ptr,
    sample_ids_ptr,
    p_ptr,
    q_ptr,
    u_ptr,
    scores_ptr,
    hidden_size,
    hidden_stride,
    num_pairs,
    num_verdicts,
    candidates,
    HAS_SAMPLES: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0 for none
    ACC: tl.constexpr,
    VERDICTS: tl.constexpr,  # both are powers of two
    CANDIDATES: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    """Process one sample (a program): it finds its pairs, puts their p through global memory, then q, u and scores row by row."""
    sample = tl.program_id(0).to(tl.int64)
    square = sample * candidates * candidates
    others = tl.arange(0, CANDIDATES)
    inside = others < candidates
    for row in range(0, candidates):
        missing = tl.full((CANDIDATES,), -1.0, ACC)
        tl.store(p_ptr + square + row * candidates + others, missing, mask=inside)
    tl.debug_barrier()
    verdicts = tl.arange(0, VERDICTS)
    is_verdict = verdicts < num_verdicts
    values = tl.load(values_ptr + verdicts, mask=is_verdict, other=0.0).to(ACC)
    start, end = 0, num_pairs
    if HAS_SAMPLES:
        # The sample's pairs lie between these; they are all that lies there where samples follow each other.
        start, end = num_pairs, 0
        for at in range(0, num_pairs, BLOCK_SCAN):
            positions = at + tl.arange(0, BLOCK_SCAN)
            of_sample = tl.load(sample_ids_ptr + positions, mask=positions < num_pairs, other=-1) == sample
            start = tl.minimum(start, tl.min(tl.where(of_sample, positions, num_pairs), 0))
            end = tl.maximum(end, tl.max(tl.where(of_sample, positions + 1, 0), 0))
    for at in range(start, end, BLOCK_PAIRS):
        pairs = (at + tl.arange(0, BLOCK_PAIRS)).to(tl.int64)
        is_pair = pairs < end
        if HAS_SAMPLES:
            is_pair &= tl.load(sample_ids_ptr + pairs, mask=is_pair, other=-1) == sample
        logits = tl.zeros((BLOCK_PAIRS, VERDICTS), ACC)
        for begin in range(0, hidden_size, BLOCK_HIDDEN):
            dims = begin + tl.arange(0, BLOCK_HIDDEN)
            is_dim = dims < hidden_size
            h = tl.load(
                hidden_ptr + pairs[:, None] * hidden_stride + dims[None],
                mask=is_pair[:, None] & is_dim[None],
                other=0.0,
            )
            w = tl.load(
                weight_ptr + verdicts[:, None] * hidden_size + dims[None],
                mask=is_verdict[:, None] & is_dim[None],
                other=0.0,
            )
            logits += tl.sum(h.to(ACC)[:, None, :] * w.to(ACC)[None], 2)
        if SOFTCAP != 0.0:
            logits = SOFTCAP * (2.0 / (1.0 + tl.exp(-2.0 / SOFTCAP * logits)) - 1.0)  # tanh; where exp overflows, -1
        logits = tl.where(is_verdict[None], logits, float("-inf"))
        shares = tl.exp(logits - tl.max(logits, 1)[:, None])
        wins = tl.sum(shares * values[None], 1) / tl.sum(shares, 1)
        first = tl.load(first_ptr + pairs, mask=is_pair, other=0)
        second = tl.load(second_ptr + pairs, mask=is_pair, other=0)
        tl.store(p_ptr + square + first * candidates + second, wins, mask=is_pair)
    tl.debug_barrier()
    for row in range(0, candidates):
        forward = tl.load(p_ptr + square + row * candidates + others, mask=inside, other=-1.0, cache_modifier=".cg")
        backward = tl.load(p_ptr + square + others * candidates + row, mask=inside, other=-1.0, cache_modifier=".cg")
        both = (forward != -1.0) & (
            backward != -1.0
        )  # a pair counts when both of its orders were judged; NaN was, badly
        q = tl.where(both, 0.5 * (forward + 1.0 - backward), 0.5)
        u = tl.where(both, tl.abs(2.0 * q - 1.0) * (1.0 - tl.abs(forward + backward - 1.0)), 0.0)
        tl.store(q_ptr + square + row * candidates + others, q, mask=inside)
        tl.store(u_ptr + square + row * candidates + others, u, mask=inside)
        total = tl.sum(u, 0)
        score = tl.sum(u * q, 0) / tl.where(total != 0.0, total, 1.0)
        tl.store(scores_ptr + sample * candidates + row, tl.where(total != 0.0, score, 0.5))


def _pairwise_verdict_triton(
    hidden: Tensor,
    verdict_weight: Tensor,
    first: Tensor,
    second: Tensor,
    verdict_values: Tensor,
    sample_ids: Tensor | None,
    samples: int,
    largest: int,
    softcap: float | None,
) -> VerdictOutput:
    p, q, u = verdict_values.new_empty(3, samples, largest, largest)
    scores = verdict_values.new_empty(samples, largest)
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    pairwise_verdict_kernel[(samples,)](
        hidden,
        verdict_weight.contiguous(),
        verdict_values.contiguous(),
        first.contiguous(),
        second.contiguous(),
        None if sample_ids is None else sample_ids.contiguous(),
        p,
        q,
        u,
        scores,
        hidden.shape[1],
        hidden.stride(0),
        len(first),
        len(verdict_weight),
        largest,
        HAS_SAMPLES=sample_ids is not None,
        SOFTCAP=softcap or 0.0,
        ACC=accumulator(hidden.dtype),
        VERDICTS=triton.next_power_of_2(len(verdict_weight)),
        CANDIDATES=triton.next_power_of_2(largest),
        **LAUNCH,
    )
    if sample_ids is None:
        return VerdictOutput(q[0], scores[0], u[0])
    return VerdictOutput(q, scores, u)
