"""Put srcfast's fused operations into transformers' layers where they compute the same: RMS norms and SwiGLU feed-forwards.

transformers' own save several copies of their input for backward; the fused ones save it once (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from srcfast.models.lora import project, project_swiglu
from srcfast_kernels import rms_norm


def fuse_modules(layers: nn.ModuleList) -> None:
    """Replace the forward passes of norms and feed-forwards in a model's layers, where the fused ones compute the same."""
    for module in layers.modules():
        if is_plain_norm(module):
            _fuse_norm(module)
        elif is_swiglu(module):
            _fuse_swiglu(module)


def has_fused(layers: nn.ModuleList) -> bool:
    """Return whether a model's layers have feed-forwards that are replaced."""
    return any(is_swiglu(module) for module in layers.modules())


@contextmanager
def ordinary_modules(layers: nn.ModuleList) -> Iterator[None]:
    """Run the body with transformers' own forward passes in place of all that were replaced."""
    replaced = {
        module: module.__dict__.pop("forward") for module in list(layers.modules()) if "forward" in module.__dict__
    }
    try:
        yield
    finally:
        for module, forward in replaced.items():
            module.__dict__["forward"] = forward


def is_swiglu(module: Any) -> bool:
    """Return whether a module is down(silu(gate(x)) * up(x)), by its parts."""
    parts = {name for name, _ in module.named_children()}
    activation = type(getattr(module, "act_fn", None)).__name__
    return (
        {"gate_proj", "up_proj", "down_proj"} <= parts and len(parts) <= 4 and activation in ("SiLU", "SiLUActivation")
    )


@torch.no_grad()
def is_plain_norm(module: Any) -> bool:
    """Return whether a module is x / rms(x) * weight, by its name and by what it makes of random numbers."""
    weight, eps = getattr(module, "weight", None), _eps_of(module)
    if (
        not type(module).__name__.endswith("RMSNorm")
        or not isinstance(weight, Tensor)
        or eps is None
        or weight.ndim != 1
    ):
        return False
    x = torch.linspace(-2.0, 3.0, 2 * len(weight), device=weight.device).view(2, -1).to(weight.dtype)
    rounding = 4 * torch.finfo(weight.dtype).eps
    return torch.allclose(module(x).double(), rms_norm(x, weight, eps).double(), rtol=rounding, atol=rounding)


def _eps_of(module: Any) -> float | None:
    return next((float(value) for name in ("variance_epsilon", "eps") if (value := getattr(module, name, None))), None)


def _fuse_norm(module: Any) -> None:
    eps = _eps_of(module)
    assert eps is not None

    def forward(x: Tensor) -> Tensor:
        return rms_norm(x.reshape(-1, x.shape[-1]), module.weight, eps).view(x.shape)

    module.forward = forward


def _fuse_swiglu(module: Any) -> None:
    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [T, D]
        keys = getattr(module.down_proj, "row_keys", None)
        gate, up = project(rows, module.gate_proj, module.up_proj, keys=keys)  # [T, F] each
        return project_swiglu(gate, up, module.down_proj, keys).view(*x.shape[:-1], -1)

    module.forward = forward
