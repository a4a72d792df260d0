"""A linear with a LoRA adapter beside it (Hu et al., 2021, arXiv 2106.09685)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """x W^T + bias + scaling (x A^T) B^T. x: [T, in], weight: [out, in], A: [r, in], B: [out, r].

    For a frozen weight nothing is kept for a weight gradient; the adapter's needs x, which it shares with its neighbours,
    and x A^T [T, r].
    """
    return torch.addmm(F.linear(x, weight, bias), x @ lora_a.T, lora_b.T, alpha=scaling)


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """`lora_linear` with the merged weight."""
    return F.linear(x, weight + scaling * lora_b @ lora_a, bias)
