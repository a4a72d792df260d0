"""Compute the confidence-weighted DPO loss: one formula, for every caller.

    Delta_k = beta [(log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log pi_ref(y-))]
    L       = sum_k c_k l(Delta_k) / normalizer

DPO: Rafailov et al., 2023 (arXiv 2305.18290), eq. 7; label smoothing: conservative DPO (Mitchell, 2023); IPO: Azar et al.,
2023 (arXiv 2310.12036), eq. 17; hinge: SLiC (Zhao et al., 2023, arXiv 2305.10425). The weights are SRC's confidences.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from srcfast_kernels.backends import accumulator, backend_for
from srcfast_kernels.linear_logprob import linear_logprob

BLOCK = 256  # tokens of a sequence that are summed at a time

LossType = Literal["sigmoid", "ipo", "hinge"]


class DPOOutput(NamedTuple):
    """What the loss gives, in fp32 or fp64.

    loss: []. chosen_rewards, rejected_rewards: [P] implicit rewards beta (log pi - log pi_ref), detached.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class LinearDPOOutput(DPOOutput):
    """The same three, and as attributes log pi, [P] each, which carry the gradient, for terms that are added to the loss.

    chosen_logps, rejected_logps: of all tokens. credited_logps: of those that the loss is of, chosen and rejected.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    credited_logps: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls, output: tuple[Tensor, ...], credited: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor] | None = None
    ) -> LinearDPOOutput:
        """Add log-probabilities to (loss, chosen_rewards, rejected_rewards); without `whole` all tokens are credited."""
        result = cls(*output)
        result.credited_logps = credited
        result.chosen_logps, result.rejected_logps = credited if whole is None else whole
        return result


def weighted_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    confidence: Tensor,
    *,
    beta: float,
    label_smoothing: float | Tensor = 0.0,
    loss_type: LossType = "sigmoid",
    normalizer: float | Tensor | None = None,
) -> DPOOutput:
    """Compute the confidence-weighted DPO loss over P pairs; in fp32 (fp64 for fp64 inputs) whatever the log-probabilities' type.

    Args:
        policy_chosen_logps, policy_rejected_logps: [P] summed log-probabilities under the policy; these carry the gradient.
        ref_chosen_logps, ref_rejected_logps: [P] under the reference.
        confidence: [P] in (0, 1].
        beta: strength of the pull towards the reference.
        label_smoothing: probability in [0, 1/2) that a pair is labelled the wrong way round, or one a pair [P]; sigmoid only.
        loss_type: sigmoid; ipo: (Delta/beta - 1/(2 beta))^2; hinge: max(0, 1 - Delta).
        normalizer: the global batch's sum of confidences; default: this call's. A batch split over calls that all get the
            global one gives the same gradient as the whole.

    Raises:
        ValueError: an unknown loss type, or label smoothing with another loss than sigmoid.
    """
    exact = torch.promote_types(policy_chosen_logps.dtype, torch.float32)
    chosen = policy_chosen_logps.to(exact) - ref_chosen_logps.to(exact)
    rejected = policy_rejected_logps.to(exact) - ref_rejected_logps.to(exact)
    loss = pair_loss(chosen - rejected, beta, label_smoothing, loss_type)  # [P]
    confidence = confidence.to(exact)
    total = confidence.sum() if normalizer is None else normalizer
    rewards = ((beta * chosen).detach(), (beta * rejected).detach())
    return DPOOutput((confidence * loss).sum() / total, *rewards)


def pair_loss(log_ratio: Tensor, beta: float, label_smoothing: float | Tensor, loss_type: str) -> Tensor:
    """Compute l of each pair [P] from the difference of the two log-ratios [P] (Delta / beta)."""
    smoothed = isinstance(label_smoothing, Tensor) or label_smoothing != 0.0
    if smoothed and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing is defined for loss_type 'sigmoid', not {loss_type!r}")
    if loss_type == "sigmoid":
        delta = beta * log_ratio
        loss = -F.logsigmoid(delta)
        return loss + label_smoothing * delta if smoothed else loss  # -logsigmoid(-x) = -logsigmoid(x) + x
    if loss_type == "ipo":
        return (log_ratio - 1.0 / (2.0 * beta)) ** 2
    if loss_type == "hinge":
        return torch.relu(1.0 - beta * log_ratio)
    raise ValueError(f"loss_type: expected 'sigmoid', 'ipo' or 'hinge', found {loss_type!r}")


def linear_weighted_dpo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sequence_ids: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    confidence: Tensor,
    *,
    beta: float,
    label_smoothing: float | Tensor = 0.0,
    loss_type: LossType = "sigmoid",
    normalizer: float | Tensor | None = None,
    credited: Tensor | None = None,
    **head: Any,
) -> LinearDPOOutput:
    """Compute `linear_logprob`, its sums by sequence in a fixed order, and `weighted_dpo_loss` of them; never a [T, V] tensor.

    Args:
        hidden: [T, D]; weight: [V, D]; targets: [T].
        sequence_ids: [T] int64: 2k for tokens of pair k's chosen, 2k + 1 for its rejected response, and 2P + k for those that
            both begin with and that `hidden` holds once; they count for both.
        ref_chosen_logps, ref_rejected_logps, confidence: [P]. A pair of confidence 0 adds nothing to the loss.
        credited: [C] int64 indices of the tokens whose sums the loss is of, and the references; None: all.
        head: bias, logit_scale, softcap, ignore_index of `linear_logprob`.
    """
    logps = linear_logprob(hidden, weight, targets, **head)  # [T]
    pairs, whole = len(confidence), None
    if credited is not None:
        whole = sum_pairs(logps, sequence_ids, pairs)
        logps, sequence_ids = logps.index_select(0, credited), sequence_ids.index_select(0, credited)
    if pairs and backend_for(hidden) == "triton":
        total = confidence.sum(dtype=logps.dtype) if normalizer is None else normalizer
        reference = (ref_chosen_logps, ref_rejected_logps)
        *output, chosen, rejected = _TokenDPO.apply(
            logps, sequence_ids, *reference, confidence, total, beta, label_smoothing, loss_type
        )
        return LinearDPOOutput.of(tuple(output), (chosen, rejected), whole)
    chosen, rejected = sum_pairs(logps, sequence_ids, pairs)
    result = weighted_dpo_loss(
        chosen,
        rejected,
        ref_chosen_logps,
        ref_rejected_logps,
        confidence,
        beta=beta,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
        normalizer=normalizer,
    )
    return LinearDPOOutput.of(result, (chosen, rejected), whole)


def sum_pairs(logps: Tensor, sequence_ids: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Sum log-probabilities of tokens [T] over chosen and over rejected responses, [P] each.

    sequence_ids: [T], as for `linear_weighted_dpo`.
    """
    sums = logps.new_zeros(3 * pairs).index_add(0, sequence_ids, logps)
    ends, shared = sums[: 2 * pairs].view(pairs, 2), sums[2 * pairs :]
    return shared + ends[:, 0], shared + ends[:, 1]


def linear_weighted_dpo_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sequence_ids: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    confidence: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Compute the sigmoid loss by its definition, with all logits at once."""
    pairs = len(confidence)
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    sums = torch.stack([logps[sequence_ids == i].sum() for i in range(3 * pairs)])
    chosen, rejected = (sums[2 * pairs :] + sums[side : 2 * pairs : 2] for side in (0, 1))
    delta = beta * ((chosen - ref_chosen_logps) - (rejected - ref_rejected_logps))
    return -(confidence * torch.log(torch.sigmoid(delta))).sum() / confidence.sum()


class _TokenDPO(torch.autograd.Function):
    """Compute loss, rewards and log-probabilities of pairs from those of tokens [T] in one kernel, and d loss / d logp [T]."""

    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        sequence_ids: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        confidence: Tensor,
        normalizer: float | Tensor,
        beta: float,
        label_smoothing: float | Tensor,
        loss_type: LossType,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        output, coefficients = token_dpo_triton(
            logps,
            sequence_ids,
            ref_chosen_logps,
            ref_rejected_logps,
            confidence,
            normalizer,
            beta,
            label_smoothing,
            loss_type,
        )
        ctx.save_for_backward(coefficients, sequence_ids)
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        coefficients, sequence_ids = ctx.saved_tensors
        loss, _, _, chosen, rejected = gradients
        terms = [] if loss is None else [loss * coefficients]
        if chosen is not None or rejected is not None:
            chosen = torch.zeros_like(rejected) if chosen is None else chosen
            rejected = torch.zeros_like(chosen) if rejected is None else rejected
            by_sequence = torch.cat([torch.stack([chosen, rejected], 1).flatten(), chosen + rejected])  # [3P]
            terms.append(by_sequence.index_select(0, sequence_ids))
        return (sum(terms[1:], terms[0]) if terms else None, *[None] * 8)


@triton.jit
def token_dpo_kernel(
    logps_ptr,
    order_ptr,
    starts_ptr,
    ref_chosen_ptr,
    ref_rejected_ptr,
    confidence_ptr,
    smoothing_ptr,
    normalizer_ptr,
    losses_ptr,
    loss_ptr,
    chosen_rewards_ptr,
    rejected_rewards_ptr,
    chosen_logps_ptr,
    rejected_logps_ptr,
    coefficients_ptr,
    arrived_ptr,
    pairs,
    BETA: tl.constexpr,
    LOSS_TYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one pair (a program). The last to arrive sums the losses in a fixed order, so no bit depends on which it is."""
    pair = tl.program_id(0)
    start = tl.load(starts_ptr + 2 * pair)
    middle = tl.load(starts_ptr + 2 * pair + 1)
    end = tl.load(starts_ptr + 2 * pair + 2)
    shared_start = tl.load(starts_ptr + 2 * pairs + pair)
    shared_end = tl.load(starts_ptr + 2 * pairs + pair + 1)
    shared = _sum(logps_ptr, order_ptr, shared_start, shared_end, ACC, BLOCK)
    policy_chosen = shared + _sum(logps_ptr, order_ptr, start, middle, ACC, BLOCK)
    policy_rejected = shared + _sum(logps_ptr, order_ptr, middle, end, ACC, BLOCK)
    chosen = policy_chosen - tl.load(ref_chosen_ptr + pair).to(ACC)
    rejected = policy_rejected - tl.load(ref_rejected_ptr + pair).to(ACC)
    weight = tl.load(confidence_ptr + pair).to(ACC) / tl.load(normalizer_ptr).to(ACC)
    ratio = chosen - rejected
    delta = BETA * ratio
    if LOSS_TYPE == "sigmoid":
        small = tl.exp(-tl.abs(delta))
        smoothing = tl.load(smoothing_ptr + pair).to(ACC)
        loss = tl.maximum(-delta, 0.0) + tl.log(1.0 + small) + smoothing * delta
        slope = BETA * (smoothing - tl.where(delta >= 0.0, small, 1.0) / (1.0 + small))
    elif LOSS_TYPE == "ipo":
        excess = ratio - 0.5 / BETA
        loss = excess * excess
        slope = 2.0 * excess
    else:
        loss = tl.maximum(1.0 - delta, 0.0)
        slope = -BETA * tl.where(delta < 1.0, 1.0, 0.0).to(ACC)
    tl.store(chosen_logps_ptr + pair, policy_chosen)
    tl.store(rejected_logps_ptr + pair, policy_rejected)
    tl.store(chosen_rewards_ptr + pair, BETA * chosen)
    tl.store(rejected_rewards_ptr + pair, BETA * rejected)
    tl.store(losses_ptr + pair, weight * loss)
    # Shared tokens' coefficients stay 0: in the margin they cancel.
    _fill(coefficients_ptr, order_ptr, start, middle, weight * slope, BLOCK)
    _fill(coefficients_ptr, order_ptr, middle, end, -weight * slope, BLOCK)
    tl.debug_barrier()  # every thread has written before the program says that it has arrived
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == pairs - 1:
        total = tl.zeros((BLOCK,), ACC)
        for at in range(0, pairs, BLOCK):
            positions = at + tl.arange(0, BLOCK)
            total += tl.load(losses_ptr + positions, mask=positions < pairs, other=0.0, cache_modifier=".cg")
        tl.store(loss_ptr, tl.sum(total, 0))


@triton.jit
def _sum(values_ptr, order_ptr, start, end, ACC: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), ACC)
    for at in range(start, end, BLOCK):
        positions = at + tl.arange(0, BLOCK)
        inside = positions < end
        token = tl.load(order_ptr + positions, mask=inside, other=0)
        total += tl.load(values_ptr + token, mask=inside, other=0.0).to(ACC)
    return tl.sum(total, 0)


@triton.jit
def _fill(values_ptr, order_ptr, start, end, value, BLOCK: tl.constexpr):
    for at in range(start, end, BLOCK):
        positions = at + tl.arange(0, BLOCK)
        token = tl.load(order_ptr + positions, mask=positions < end, other=0)
        tl.store(values_ptr + token, value, mask=positions < end)


def _as_scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """Put a number, or a tensor [] or [P], on the device of `like` in its type; a number is filled in there, not copied."""
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)


def token_dpo_triton(
    logps: Tensor,
    sequence_ids: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    confidence: Tensor,
    normalizer: float | Tensor,
    beta: float,
    label_smoothing: float | Tensor,
    loss_type: LossType,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Launch `token_dpo_kernel`: what `LinearDPOOutput` holds, and d loss / d logp [T]. Nothing waits for the device."""
    pairs = len(confidence)
    smoothed = isinstance(label_smoothing, Tensor) or label_smoothing != 0.0
    if loss_type not in ("sigmoid", "ipo", "hinge") or (smoothed and loss_type != "sigmoid"):
        pair_loss(logps[:0], beta, label_smoothing, loss_type)  # which says what is wrong
    sorted_ids, order = torch.sort(sequence_ids, stable=True)  # [T] each
    starts = torch.searchsorted(sorted_ids, torch.arange(3 * pairs + 1, device=logps.device))  # [3P + 1]
    smoothing = _as_scalar(label_smoothing, logps).expand(pairs).contiguous()
    total = _as_scalar(normalizer, logps)
    losses, chosen_rewards, rejected_rewards, chosen, rejected = logps.new_empty(5, pairs).unbind()
    output = (logps.new_empty(()), chosen_rewards, rejected_rewards, chosen, rejected)
    coefficients = torch.zeros_like(logps)
    token_dpo_kernel[(pairs,)](
        logps,
        order,
        starts,
        ref_chosen_logps.contiguous(),
        ref_rejected_logps.contiguous(),
        confidence.contiguous(),
        smoothing,
        total,
        losses,
        *output,
        coefficients,
        torch.zeros((), dtype=torch.int32, device=logps.device),
        pairs,
        BETA=beta,
        LOSS_TYPE=loss_type,
        ACC=accumulator(logps.dtype),
        BLOCK=BLOCK,
        num_warps=4,
    )
    return output, coefficients
