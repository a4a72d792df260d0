"""The confidence-weighted DPO loss: one formula, in one place.

    Delta_k = beta [(log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log pi_ref(y-))]
    L       = sum_k c_k l(Delta_k) / normalizer

DPO: Rafailov et al., 2023 (arXiv 2305.18290), eq. 7; label smoothing: conservative DPO (Mitchell, 2023); IPO: Azar et al.,
2023 (arXiv 2310.12036), eq. 17; hinge: SLiC (Zhao et al., 2023, arXiv 2305.10425). The weights are SRC's confidences.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from srcfast_kernels.linear_logprob import linear_logprob

LossType = Literal["sigmoid", "ipo", "hinge"]


class DPOOutput(NamedTuple):
    """Scalar loss, and per pair the implicit rewards beta (log pi - log pi_ref), detached, [P] each."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


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
    """Confidence-weighted DPO loss over P pairs.

    Args:
        policy_chosen_logps, policy_rejected_logps: [P] summed log-probabilities under the policy; these carry the gradient.
        ref_chosen_logps, ref_rejected_logps: [P] under the reference.
        confidence: [P] in (0, 1].
        beta: strength of the pull towards the reference.
        label_smoothing: probability in [0, 1/2) that a pair is labelled the wrong way round, or one a pair [P]; sigmoid only.
        loss_type: sigmoid; ipo: (Delta/beta - 1/(2 beta))^2; hinge: max(0, 1 - Delta).
        normalizer: the global batch's sum of confidences; default: this call's own. A batch split over calls that all get the
            global one gives the same gradient as the whole.

    Raises:
        ValueError: an unknown loss type, or label smoothing with another loss than sigmoid.
    """
    chosen = policy_chosen_logps - ref_chosen_logps
    rejected = policy_rejected_logps - ref_rejected_logps
    loss = pair_loss(chosen - rejected, beta, label_smoothing, loss_type)  # [P]
    total = confidence.sum() if normalizer is None else normalizer
    return DPOOutput((confidence * loss).sum() / total, (beta * chosen).detach(), (beta * rejected).detach())


def pair_loss(log_ratio: Tensor, beta: float, label_smoothing: float | Tensor, loss_type: str) -> Tensor:
    """l of each pair [P], from the difference of the two log-ratios [P] (Delta / beta)."""
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
    **head: Any,
) -> DPOOutput:
    """`linear_logprob`, summed by sequence in a fixed order, into `weighted_dpo_loss`; never a [T, V] tensor.

    Args:
        hidden: [T, D]; weight: [V, D]; targets: [T].
        sequence_ids: [T] int64: 2k for tokens of pair k's chosen, 2k + 1 for its rejected response.
        ref_chosen_logps, ref_rejected_logps, confidence: [P].
        head: bias, logit_scale, softcap, ignore_index of `linear_logprob`.
    """
    logps = linear_logprob(hidden, weight, targets, **head)  # [T]
    pairs = len(confidence)
    sums = logps.new_zeros(2 * pairs).index_add(0, sequence_ids, logps).view(pairs, 2)
    return weighted_dpo_loss(
        sums[:, 0],
        sums[:, 1],
        ref_chosen_logps,
        ref_rejected_logps,
        confidence,
        beta=beta,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
        normalizer=normalizer,
    )


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
    """The sigmoid loss by its definition, with all logits at once."""
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    sums = torch.stack([logps[sequence_ids == i].sum() for i in range(2 * len(confidence))]).view(-1, 2)
    delta = beta * ((sums[:, 0] - ref_chosen_logps) - (sums[:, 1] - ref_rejected_logps))
    return -(confidence * torch.log(torch.sigmoid(delta))).sum() / confidence.sum()
