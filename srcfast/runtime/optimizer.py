"""AdamW over one flat buffer, global-norm clipping, warm-up and cosine.

Parameters and gradients become views of two flat tensors, so that zeroing, the norm, clipping and the update
are one operation each, however many LoRA matrices there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from srcfast.errors import InputError


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, 2019), applied to matrices only; vectors are not
    decayed.

    Args:
        parameters: trainable ones, of one dtype on one device; each becomes a view of the flat buffer.
        weight_decay, betas, epsilon: as in the paper.

    Raises:
        InputError: no parameter, or several dtypes or devices.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        # Matrices first, so that each of the two decay groups is one contiguous slice.
        ordered = sorted(dict.fromkeys(parameters), key=lambda parameter: parameter.dim() < 2)
        kinds = {(parameter.dtype, parameter.device) for parameter in ordered}
        if len(kinds) != 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none"
            raise InputError(
                field="parameters", expected="trainable parameters of one dtype on one device", found=found
            )
        sizes = [parameter.numel() for parameter in ordered]
        matrices = sum(parameter.numel() for parameter in ordered if parameter.dim() >= 2)
        self.weights = torch.cat([parameter.detach().reshape(-1) for parameter in ordered])  # [n]
        self.gradients = torch.zeros_like(self.weights)  # [n]
        for parameter, weight, gradient in zip(
            ordered, self.weights.split(sizes), self.gradients.split(sizes), strict=True
        ):
            parameter.data = weight.view_as(parameter)
            parameter.grad = gradient.view_as(parameter)

        groups = []
        for part, decay in ((slice(0, matrices), weight_decay), (slice(matrices, None), 0.0)):
            flat = nn.Parameter(self.weights[part])
            flat.grad = self.gradients[part]
            if flat.numel():
                groups.append({"params": [flat], "weight_decay": decay})
        self._update = torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=True)

    def zero_grad(self) -> None:
        """Gradients to nought, in place: the parameters' `.grad` stay views of the flat buffer."""
        self.gradients.zero_()

    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients together, a scalar tensor on the device."""
        return torch.linalg.vector_norm(self.gradients)

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale the gradients so that their norm, which is `norm`, becomes at most `max_norm`."""
        if norm > max_norm:
            self.gradients.mul_(max_norm / norm)

    def step(self, learning_rate: float) -> None:
        """One update with this learning rate."""
        for group in self._update.param_groups:
            group["lr"] = learning_rate
        self._update.step()

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step counts as flat tensors, fit for safetensors."""
        return {
            f"{number}.{name}": value
            for number, state in self._update.state_dict()["state"].items()
            for name, value in state.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; the parameters must be the same in number and size."""
        nested = self._update.state_dict()
        nested["state"] = {}
        for name, value in state.items():
            number, _, entry = name.partition(".")
            nested["state"].setdefault(int(number), {})[entry] = value
        self._update.load_state_dict(nested)


def learning_rate_at(
    step: int, total_steps: int, peak: float, warmup_ratio: float = 0.0, min_ratio: float = 0.0
) -> float:
    """Linear warm-up over the first `warmup_ratio` of the steps, then a cosine down to `min_ratio * peak`.

    The first step already has a rate above nought, and the last one reaches the least.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - 1 - warmup, 1)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
