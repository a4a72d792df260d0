"""A frozen linear layer in 4 bits (QLoRA: Dettmers et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from srcfast.models.protocols import TransformerDecoder
from srcfast.models.sharding import set_parameter
from srcfast_kernels import NF4Weight, nf4_linear, nf4_quantize
from srcfast_kernels.nf4 import nf4_flat, nf4_flat_size, nf4_from_flat


class NF4Linear(nn.Module):
    """Compute x W^T + bias, W [out, in] in NF4 with double quantisation; without `flat`, `weight` is None until it is set.

    With `flat`, codes and scales are one parameter, a row of fp32 words, which can be sharded (`models.sharding`): FSDP2 of
    PyTorch 2.11 takes no integers.
    """

    flat: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool, flat: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.dtype = torch.get_default_dtype()
        self._weight: NF4Weight | None = None
        codes = torch.empty(nf4_flat_size(out_features * in_features), dtype=torch.float32) if flat else None
        self.flat = None if codes is None else nn.Parameter(codes, requires_grad=False)

    @property
    def num_weights(self) -> int:
        """Return the number of weights."""
        return self.out_features * self.in_features

    @property
    def weight(self) -> NF4Weight | None:
        if self.flat is None:
            return self._weight
        return nf4_from_flat(self.flat, torch.Size((self.out_features, self.in_features)), self.dtype)

    def set_weight(self, weight: Tensor) -> None:
        """Quantise a weight [out, in]; products will be in its dtype."""
        self.set_quantized(nf4_quantize(weight))

    def set_quantized(self, weight: NF4Weight) -> None:
        """Set a weight in 4 bits. Raises ValueError where it can't be stored flat."""
        if self.flat is None:
            self._weight = weight
        else:
            self.dtype = weight.dtype
            set_parameter(self.flat, nf4_flat(weight))

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None, "loading a checkpoint sets it"
        return nf4_linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """Move the weight with the module, but never cast its scales."""

        def move(parameter: Tensor) -> Tensor:
            moved: Tensor = fn(parameter)
            is_flat = parameter is self.flat
            return parameter.to(moved.device) if is_flat and moved.dtype != parameter.dtype else moved

        super()._apply(move, recurse)
        if self._weight is not None:
            device = fn(self._weight.packed).device
            values = {field.name: getattr(self._weight, field.name) for field in fields(self._weight)}
            moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
            self._weight = replace(self._weight, **moved)
        return self


def quantize_linears(decoder: TransformerDecoder, flat: bool = False) -> None:
    """Replace the linear layers of a decoder's blocks, before weights are loaded, by 4-bit ones; not embedding and head."""
    for block, name, linear in block_linears(decoder):
        if isinstance(linear, nn.Linear):
            setattr(block, name, NF4Linear(linear.in_features, linear.out_features, linear.bias is not None, flat))


def plain_linears(blocks: nn.Module) -> Iterator[nn.Linear | NF4Linear]:
    """Yield the linears of a decoder's blocks, those within adapters included."""
    for module in blocks.modules():
        if isinstance(module, nn.Linear | NF4Linear):
            yield module


def block_linears(decoder: TransformerDecoder) -> Iterator[tuple[nn.Module, str, nn.Linear | NF4Linear]]:
    """Yield (parent, name, linear) of a decoder's blocks in one order, by which dropout numbers them and adapters are drawn."""
    for layer in decoder.layers:
        for path, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear | NF4Linear):
                parent, _, name = path.rpartition(".")
                yield layer.get_submodule(parent), name, linear
