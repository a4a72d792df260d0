"""Experts of transformers' mixture-of-experts layers in 4 bits: one matrix of one expert is dequantised at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srcfast_kernels import NF4Weight, nf4_dequantize, nf4_linear, nf4_quantize
from srcfast_kernels.nf4 import nf4_flat, nf4_from_flat


@dataclass(frozen=True)
class ExpertMatrix:
    """A matrix in 4 bits that torch's functions take as a tensor; `F.linear` saves it in 4 bits for backward."""

    weight: NF4Weight

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.linear and not options and len(arguments) == 2 and isinstance(arguments[1], cls):
            return nf4_linear(arguments[0], arguments[1].weight, None)
        whole = [nf4_dequantize(one.weight) if isinstance(one, cls) else one for one in arguments]
        return function(*whole, **(options or {}))


class NF4Experts(nn.Module):
    """Matrices of a layer's experts in NF4, in place of a parameter [E, out, in]; `experts[i]` is that of one expert.

    Attributes:
        flat: [E, words] fp32, codes and scales; see `NF4Linear`.
    """

    def __init__(self, weights: Tensor, device: str | torch.device) -> None:
        super().__init__()
        self.shape, self.dtype = weights.shape[1:], weights.dtype
        rows = [nf4_flat(nf4_quantize(weight.to(device))) for weight in weights.detach()]
        self.flat = nn.Parameter(torch.stack(rows), requires_grad=False)

    @property
    def num_weights(self) -> int:
        """Return the number of all experts' weights."""
        return len(self.flat) * math.prod(self.shape)

    def __getitem__(self, expert: Any) -> ExpertMatrix:
        return ExpertMatrix(nf4_from_flat(self.flat[int(expert)], self.shape, self.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Experts:
        """Move the weights with the module, but never cast their scales."""

        def move(parameter: Tensor) -> Tensor:
            moved: Tensor = fn(parameter)
            return parameter.to(moved.device) if moved.dtype != parameter.dtype else moved

        super()._apply(move, recurse)
        return self


def replace_experts(module: Any, name: str, experts: NF4Experts) -> None:
    """Put experts in 4 bits in place of a parameter, and let transformers compute one after the other."""
    delattr(module, name)
    setattr(module, name, experts)
    module.config._experts_implementation = "eager"  # the other ways take all experts' weights as one tensor


def expert_parameters(layers: nn.Module) -> Iterator[tuple[Any, str]]:
    """Yield (module, name) of the parameters [E, out, in] of experts to which transformers' ways to compute experts apply."""
    for module in list(layers.modules()):
        if hasattr(module, "is_transposed") and hasattr(
            module, "has_gate"
        ):  # set by transformers' decorator of their classes
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim == 3:
                    yield module, name


def has_experts_in_4_bits(decoder: nn.Module) -> bool:
    """Return whether a decoder has such experts: which ones a step computes is then known on the host alone."""
    return any(isinstance(module, NF4Experts) for module in decoder.modules())
