"""AdamW over one flat buffer, global-norm clipping, and a learning rate with warm-up and cosine decay.

Parameters and gradients become views of two flat tensors, so that zeroing, the norm, clipping and the update are one operation
each, however many LoRA matrices there are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from srcfast.config.settings import OptimizerName
from srcfast.errors import ConfigError, InputError

# Settings' names -> bitsandbytes' classes: moments in 8 bits (Dettmers et al., 2022, arXiv 2110.02861), or in managed memory
# that moves to the host when the GPU's memory is full (Dettmers et al., 2023, arXiv 2305.14314).
BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
CODE_BOOKS = "qmap"  # prefix of the 8-bit moments' quantisation maps: constants, which are not saved
SMALLEST_IN_8_BITS = 4096  # weights; bitsandbytes stores the moments of smaller tensors in 32 bits


class AdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019) of matrices; vectors are not decayed.

    Args:
        parameters: to train, of one dtype on one device; each becomes a view of the flat buffer.
        weight_decay: of matrices; betas and epsilon are the paper's.
        name: "adamw" is PyTorch's fused one. The others are bitsandbytes': 8 bits a moment instead of 32, in blocks of 256;
            paged moments are in memory that a GPU shares with its host (on a CPU in ordinary memory). These optimizers wait
            for the GPU at every update.

    Raises:
        InputError: no parameter, or several dtypes or devices.
        ConfigError: the optimizer's package can't be imported, or can't update such parameters on their device.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        weight_decay: float = 0.0,
        name: OptimizerName = "adamw",
    ) -> None:
        # Matrices first, so that each of the two decay groups is one contiguous slice.
        ordered = sorted(dict.fromkeys(parameters), key=lambda parameter: parameter.dim() < 2)
        kinds = {f"{parameter.dtype} on {parameter.device}" for parameter in ordered}
        if len(kinds) != 1:
            raise InputError(
                field="parameters",
                expected="trainable parameters of one dtype on one device",
                found=", ".join(sorted(kinds)) or "none",
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
        for section, decay in ((slice(0, matrices), weight_decay), (slice(matrices, None), 0.0)):
            flat = nn.Parameter(self.weights[section])
            flat.grad = self.gradients[section]
            if flat.numel():
                groups.append({"params": [flat], "weight_decay": decay})
        update_class = partial(torch.optim.AdamW, fused=True) if name == "adamw" else _bitsandbytes(name, self.weights)
        self._update: Any = update_class(groups, betas=(0.9, 0.999), eps=1e-8)
        self.skips_on_device = name == "adamw"  # whether `step` takes `finite`

    def zero_grad(self) -> None:
        """Set the gradients to zero in place, so that the parameters' `.grad` stay views of the flat buffer."""
        self.gradients.zero_()

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of all gradients together, a scalar tensor on the device."""
        return torch.linalg.vector_norm(self.gradients)

    def clip(self, norm: float | Tensor, max_norm: float) -> None:
        """Scale the gradients, whose norm is `norm`, to a norm of at most `max_norm`. With a tensor the host does not wait."""
        if isinstance(norm, Tensor):
            self.gradients.mul_((max_norm / norm).clamp(max=1.0))
        elif norm > max_norm:
            self.gradients.mul_(max_norm / norm)

    def step(self, learning_rate: float, finite: Tensor | None = None) -> None:
        """Update weights and moments.

        Args:
            learning_rate: of this update.
            finite: a boolean scalar on the device; if it is False, neither weights nor moments change. Only for optimizers
                with `skips_on_device`.
        """
        for group in self._update.param_groups:
            group["lr"] = learning_rate
        if self.skips_on_device:
            self._update.found_inf = None if finite is None else finite.logical_not().float()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")  # as the docstring says
            self._update.step()

    def state_dict(self) -> dict[str, Tensor]:
        """Return moments and step counts as flat tensors for safetensors; 8-bit moments with their scales."""
        return {
            f"{number}.{name}": torch.as_tensor(value)
            for number, parameter in enumerate(self._parameters())
            for name, value in self._update.state[parameter].items()
            if not name.startswith(CODE_BOOKS)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned for the same optimizer over parameters of the same number and sizes.

        Raises:
            InputError: the state is of another optimizer or of other parameters.
        """
        nested: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            group, _, name = key.partition(".")
            nested.setdefault(int(group), {})[name] = value
        if not self.skips_on_device:
            self._load_bitsandbytes(nested)
            return
        for index, parameter in enumerate(self._parameters()):
            if stored := nested.get(index, {}):
                _check_shapes(stored, dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter))
        self._update.load_state_dict(self._update.state_dict() | {"state": nested})

    def _load_bitsandbytes(self, nested: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Copy the state into buffers that bitsandbytes allocates, so that paged ones stay paged."""
        for index, group in enumerate(self._update.param_groups):
            (parameter,) = group["params"]
            stored = nested.get(index, {})
            if not stored:
                continue
            self._update.init_state(group, parameter, index, 0)
            state = self._update.state[parameter]
            _check_shapes(stored, state)
            for name, value in stored.items():
                if name == "step":
                    state[name] = int(value)
                else:
                    state[name].copy_(value)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._update.param_groups for parameter in group["params"]]


def _bitsandbytes(name: OptimizerName, weights: Tensor) -> Any:
    """Return bitsandbytes' class. Raises ConfigError if it can't be imported, or can't update these weights on their device."""
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
    optimizer_class = getattr(bitsandbytes.optim, BITSANDBYTES[name])
    if weights.is_cuda:
        _try_update(name, optimizer_class, weights)
    return optimizer_class


def _try_update(name: OptimizerName, optimizer_class: Any, weights: Tensor) -> None:
    """Update weights that are made for this check. Raises ConfigError if that fails.

    Where bitsandbytes' CUDA library does not load, or has no code for this GPU, its import succeeds. The error would come only
    with the first update, after the first forward and backward pass.
    """
    sample = nn.Parameter(weights.new_zeros(SMALLEST_IN_8_BITS))
    sample.grad = torch.zeros_like(sample)
    try:
        optimizer_class([sample], lr=1e-3).step()
        torch.cuda.synchronize(weights.device)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ConfigError(
            f"optimizer {name}: expected a CUDA library of bitsandbytes that runs on {weights.device}, found {reason} "
            "Fix: see `python -m bitsandbytes`, or optimizer=adamw"
        ) from error


def _shapes(state: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the shapes of a parameter's moments, which tell optimizers and parameters apart."""
    return {
        name: list(value.shape)
        for name, value in state.items()
        if name != "step" and not name.startswith(CODE_BOOKS) and isinstance(value, Tensor)
    }


def _check_shapes(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise InputError if a parameter's stored state has other moments than expected."""
    if _shapes(stored) != _shapes(expected):
        names = ", ".join(sorted(map(str, _shapes(expected).items())))
        raise InputError(
            field="optimizer state",
            expected=f"that of this optimizer over these parameters ({names})",
            found=", ".join(sorted(map(str, _shapes(stored).items()))),
            fix="continue with the settings that the state was saved under",
        )


def learning_rate_at(
    step: int, total_steps: int, peak: float, warmup_ratio: float = 0.0, min_ratio: float = 0.0
) -> float:
    """Return the learning rate of a step: linear warm-up over the first `warmup_ratio` of the steps, then cosine decay.

    The first step has a rate above 0, and the last one has `min_ratio * peak`.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - 1 - warmup, 1)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
