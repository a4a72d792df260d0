"""AdamW over one flat buffer, global-norm clipping, warm-up and cosine.

Parameters and gradients become views of two flat tensors, so that zeroing, the norm, clipping and the update
are one operation each, however many LoRA matrices there are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from srcfast.config.settings import OptimizerName
from srcfast.errors import ConfigError, InputError

# Ours, and bitsandbytes' names of the others: moments in 8 bits (Dettmers et al., 2022, arXiv 2110.02861), or in managed
# memory that moves to the host where the GPU has no room (Dettmers et al., 2023, arXiv 2305.14314).
BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
CODE_BOOKS = "qmap"  # of 8-bit moments, constants: no state
SMALLEST_IN_8_BITS = 4096  # weights; the moments of fewer are kept in 32 bits


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, 2019), applied to matrices only; vectors are not
    decayed.

    Args:
        parameters: trainable ones, of one dtype on one device; each becomes a view of the flat buffer.
        weight_decay, betas, epsilon: as in the paper.
        name: "adamw" is PyTorch's, fused. The others are bitsandbytes': 8 bits a moment instead of 32, in blocks of 256;
            paged ones lie in memory that a GPU shares with its host (on a CPU: in ordinary memory). They wait for the
            GPU at every update.

    Raises:
        InputError: no parameter, or several dtypes or devices.
        ConfigError: the optimizer's package can't be imported, or can't update such parameters on their device.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        name: OptimizerName = "adamw",
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
        self._update: Any
        if name == "adamw":
            self._update = torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=True)
        else:
            self._update = _bitsandbytes(name, self.weights)(groups, betas=betas, eps=epsilon)
        self.skips_on_device = name == "adamw"  # whether `step` takes `finite`

    def zero_grad(self) -> None:
        """Gradients to nought, in place: the parameters' `.grad` stay views of the flat buffer."""
        self.gradients.zero_()

    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients together, a scalar tensor on the device."""
        return torch.linalg.vector_norm(self.gradients)

    def clip(self, norm: float | Tensor, max_norm: float) -> None:
        """Scale the gradients so that their norm, which is `norm`, becomes at most `max_norm`; a tensor isn't waited for."""
        if isinstance(norm, Tensor):
            self.gradients.mul_((max_norm / norm).clamp(max=1.0))
        elif norm > max_norm:
            self.gradients.mul_(max_norm / norm)

    def step(self, learning_rate: float, finite: Tensor | None = None) -> None:
        """One update with this learning rate.

        Args:
            learning_rate: of this update.
            finite: a boolean scalar on the device; where it is False nothing changes, neither weights nor moments. Only
                where `skips_on_device`.
        """
        for group in self._update.param_groups:
            group["lr"] = learning_rate
        if self.skips_on_device:
            self._update.found_inf = None if finite is None else finite.logical_not().float()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")  # said in the docstring
            self._update.step()

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step counts as flat tensors, fit for safetensors; 8-bit ones with their scales."""
        return {
            f"{number}.{name}": torch.as_tensor(value)
            for number, parameter in enumerate(self._parameters())
            for name, value in self._update.state[parameter].items()
            if not name.startswith(CODE_BOOKS)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; the parameters must be the same in number and size, the optimizer the same.

        Raises:
            InputError: another optimizer's state, or one of other parameters.
        """
        nested: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            group, _, name = key.partition(".")
            nested.setdefault(int(group), {})[name] = value
        if not self.skips_on_device:
            self._load_bitsandbytes(nested)
            return
        whole = self._update.state_dict()
        whole["state"] = nested
        for place, parameter in enumerate(self._parameters()):
            found = nested.get(place, {})
            own = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter)
            if found and _shapes(found) != _shapes(own):
                raise _foreign(map(str, _shapes(found).items()), map(str, _shapes(own).items()))
        self._update.load_state_dict(whole)

    def _load_bitsandbytes(self, nested: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Into buffers that bitsandbytes makes itself, so that paged ones stay paged."""
        for place, group in enumerate(self._update.param_groups):  # of one parameter each
            for parameter in group["params"]:
                found = nested.get(place, {})
                if not found:
                    continue
                self._update.init_state(group, parameter, place, 0)
                own = self._update.state[parameter]
                if _shapes(found) != _shapes(own):
                    raise _foreign(map(str, _shapes(found).items()), map(str, _shapes(own).items()))
                for name, value in found.items():
                    if name == "step":
                        own[name] = int(value)
                    else:
                        own[name].copy_(value)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._update.param_groups for parameter in group["params"]]


def _bitsandbytes(name: OptimizerName, weights: Tensor) -> Any:
    """bitsandbytes' class. Raises ConfigError where it can't be imported, or can't update such weights on their device."""
    if name not in BITSANDBYTES:
        raise ConfigError(f"optimizer: expected adamw or one of {', '.join(BITSANDBYTES)}, found {name!r}")
    try:
        import bitsandbytes
    except Exception as error:  # a broken installation raises whatever its libraries do
        raise ConfigError(
            f"optimizer {name}: expected the package bitsandbytes, which can't be imported ({type(error).__name__}: {error}). "
            "Fix: pip install bitsandbytes, or optimizer=adamw"
        ) from error
    if weights.dtype == torch.float64:
        raise ConfigError(f"optimizer {name}: expected trainable weights in fp32, fp16 or bf16, found fp64")
    made = getattr(bitsandbytes.optim, BITSANDBYTES[name])
    if weights.is_cuda:
        _try_update(name, made, weights)
    return made


def _try_update(name: OptimizerName, made: Any, weights: Tensor) -> None:
    """One update of weights made for it. Where bitsandbytes' CUDA library does not load, or has no code for this GPU, its
    import succeeds, and the first update fails, which would be after the first forward and backward pass. Raises ConfigError.
    """
    tried = nn.Parameter(weights.new_zeros(SMALLEST_IN_8_BITS))
    tried.grad = torch.zeros_like(tried)
    try:
        made([tried], lr=1e-3).step()
        torch.cuda.synchronize(weights.device)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ConfigError(
            f"optimizer {name}: expected a CUDA library of bitsandbytes that runs on {weights.device}, found {reason} "
            "Fix: see `python -m bitsandbytes`, or optimizer=adamw"
        ) from error


def _shapes(state: Mapping[str, Any]) -> dict[str, list[int]]:
    """Of what differs between optimizers and parameters."""
    return {
        name: list(value.shape)
        for name, value in state.items()
        if name != "step" and not name.startswith(CODE_BOOKS) and isinstance(value, Tensor)
    }


def _foreign(found: Iterable[str], expected: Iterable[str]) -> InputError:
    return InputError(
        field="optimizer state",
        expected=f"that of this optimizer over these parameters ({', '.join(sorted(expected))})",
        found=", ".join(sorted(found)),
        fix="continue with the settings that the state was saved under",
    )


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
