"""Log-probabilities of targets under a linear head, without the [T, V] logits of all rows at once.

With a frozen head the gradient of each log-probability with respect to its hidden state,

    d logp_t / d h_t = w_{y_t} - sum_v p_tv w_v        (times the chain of scale and softcap),

scales with one number a token, so the forward pass forms it chunk by chunk, and backward is a row scaling: two GEMMs in
all. `onehot - p` is formed in fp32 before any rounding; two rounded products are never subtracted from each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22  # logits alive at a time, 16 MiB in fp32


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """log softmax(logits)[target] for logits = scale * (hidden W^T + bias), soft-capped as softcap * tanh(x / softcap).

    Args:
        hidden: [T, D].
        weight: [V, D]; its gradient, and the bias's, is computed only where required.
        targets: [T] int64; rows of `ignore_index` give 0 and no gradient.
        bias: [V].
        logit_scale: factor on the logits, before the cap.
        softcap: Gemma's cap on logits; None for none.

    Returns:
        [T] fp32 (fp64 for fp64 inputs), never above 0.
    """
    with torch.autocast(hidden.device.type, enabled=False):  # its own casts decide what is rounded
        return _LinearLogprob.apply(hidden, weight, targets, bias, logit_scale, softcap, ignore_index)


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """`linear_logprob` in plain PyTorch, with all logits at once."""
    dtype = _compute_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    logits = logit_scale * (logits if bias is None else logits + bias.to(dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = targets != ignore_index
    logps = logits.log_softmax(-1).gather(-1, targets.where(kept, 0)[:, None])[:, 0]
    return logps.where(kept, 0.0)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        ignore_index: int,
    ) -> Tensor:
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        ctx.settings = (logit_scale, softcap, ignore_index)
        dtype = _compute_dtype(hidden)
        logps = torch.empty(len(targets), dtype=dtype, device=hidden.device)  # [T]
        frozen_head = not (needs_weight or needs_bias)
        stash = hidden.new_empty(hidden.shape) if needs_hidden and frozen_head else None  # [T, D] unit gradients
        wide = weight.to(dtype)  # once a call, not once a chunk
        for rows in _chunks(len(targets), len(weight)):
            logits, slope, lse, chunk_logps, kept = _chunk(hidden[rows], wide, targets[rows], bias, *ctx.settings)
            logps[rows] = chunk_logps
            if stash is not None:
                residual = _residual(logits, slope, lse, targets[rows], kept, logit_scale)
                stash[rows] = (residual.to(weight.dtype) @ weight).to(stash.dtype)
        if stash is not None:
            ctx.save_for_backward(stash)
        else:
            ctx.save_for_backward(*([hidden, weight, targets] + ([] if bias is None else [bias])))
        ctx.frozen_head = frozen_head
        return logps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]  # [T]
        with torch.autocast(gradient.device.type, enabled=False):
            return _backward(ctx, gradient)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.frozen_head:
        (stash,) = ctx.saved_tensors
        return ((gradient[:, None] * stash).to(stash.dtype), *[None] * 6)
    hidden, weight, targets, *rest = ctx.saved_tensors
    bias = rest[0] if rest else None
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    dtype = _compute_dtype(hidden)
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_weight else None
    grad_bias = torch.zeros(len(weight), dtype=dtype, device=weight.device) if needs_bias else None
    wide = weight.to(dtype)
    for rows in _chunks(len(targets), len(weight)):
        logits, slope, lse, _, kept = _chunk(hidden[rows], wide, targets[rows], bias, *ctx.settings)
        residual = _residual(logits, slope, lse, targets[rows], kept, ctx.settings[0])
        residual *= gradient[rows, None]
        if grad_hidden is not None:
            grad_hidden[rows] = (residual.to(weight.dtype) @ weight).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight.addmm_(residual.T, hidden[rows].to(dtype))
        if grad_bias is not None:
            grad_bias += residual.sum(0)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None,
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        None,
        None,
        None,
    )


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Of one chunk of rows: logits [n, V], the cap's slope [n, V] or None, lse [n, 1], logps [n], which rows count [n].

    All is computed in the weight's dtype.
    """
    logits = hidden.to(weight.dtype) @ weight.T
    if bias is not None:
        logits += bias.to(weight.dtype)
    if logit_scale != 1.0:
        logits *= logit_scale
    slope = None
    if softcap is not None:
        capped = torch.tanh(logits / softcap)
        slope = 1.0 - capped * capped
        logits = capped * softcap
    kept = targets != ignore_index
    lse = logits.logsumexp(-1, keepdim=True)
    logps = (logits.gather(-1, targets.where(kept, 0)[:, None]) - lse)[:, 0]
    # Rounding may put a certain token a hair above 0; a log-probability never is.
    return logits, slope, lse, logps.clamp(max=0.0).where(kept, 0.0), kept


def _residual(
    logits: Tensor, slope: Tensor | None, lse: Tensor, targets: Tensor, kept: Tensor, logit_scale: float
) -> Tensor:
    """d logp / d (hidden W^T) [n, V]: (onehot - p) times the chain of cap and scale; written over `logits`."""
    residual = logits.sub_(lse).exp_().neg_()
    rows = torch.arange(len(targets), device=targets.device)
    residual[rows, targets.where(kept, 0)] += 1.0
    residual *= kept[:, None]
    if slope is not None:
        residual *= slope
    return residual if logit_scale == 1.0 else residual.mul_(logit_scale)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, vocabulary))
    return [slice(start, start + size) for start in range(0, rows, size)]


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
