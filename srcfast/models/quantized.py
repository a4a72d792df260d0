"""A frozen linear layer in 4 bits (QLoRA: Dettmers et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from srcfast_kernels import NF4Weight, nf4_linear, nf4_quantize


class NF4Linear(nn.Module):
    """x W^T + bias, W [out, in] in NF4 with double quantisation; `weight` is None until it is set."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight: NF4Weight | None = None
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def set_weight(self, weight: Tensor) -> None:
        """Quantise [out, in]; products will be in its dtype."""
        self.weight = nf4_quantize(weight)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None, "a checkpoint sets it"
        return nf4_linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """Move the weight with the module, but never cast its scales."""
        super()._apply(fn, recurse)
        if self.weight is not None:
            device = fn(self.weight.packed).device
            parts = {field.name: getattr(self.weight, field.name) for field in fields(self.weight)}
            moved = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)}
            self.weight = replace(self.weight, **moved)
        return self


def quantize_linears(decoder: nn.Module) -> None:
    """Replace the linear layers of a decoder's blocks, not yet filled, by 4-bit ones. Embedding and head stay."""
    for layer in decoder.layers:  # type: ignore[union-attr]
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, NF4Linear(linear.in_features, linear.out_features, linear.bias is not None))
