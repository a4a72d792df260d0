"""RMS normalisation (Zhang and Sennrich, 2019, arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x: [..., D], weight: [D].

    Of a frozen weight no gradient is computed.
    """
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return _RMSNorm.apply(x, weight, eps)  # half the time of PyTorch's, which is fused on GPUs alone
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`rms_norm` by its definition."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients  # [..., D]
        x, weight, inverse = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_weight:
            grad_weight = (gradient * x).mul_(inverse).reshape(-1, x.shape[-1]).sum(0)
        if needs_x:
            scaled = gradient * weight
            shared = (scaled * x).sum(-1, keepdim=True).div_(x.shape[-1]).mul_(inverse.pow(3))  # [..., 1]
            grad_x = scaled.mul_(inverse).addcmul_(x, shared, value=-1.0)
        return grad_x, grad_weight, None
