"""Put srcfast's fused operations into transformers' layers where they compute the same.

Norms and SwiGLU feed-forwards save their input once for backward (docs/kernels.md); so do rotary positions and projections of one
input. A layer that is a plain pre-norm block runs as the hand-written decoder's does, and the last one for the needed rows alone.
What a module computes is seen from its parts and from its outputs for random numbers, not from its name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from srcfast.models.decoder import AttendLayer, run_attention, run_layer, run_swiglu
from srcfast.models.lora import LoRALinear
from srcfast.models.quantized import NF4Linear
from srcfast_kernels import rms_norm

GATED = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
LINEARS = (nn.Linear, NF4Linear, LoRALinear)
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
OPTIONS = {"scaling", "sliding_window", "softcap"}  # that plain attention passes on beside queries, keys and values
# Passed on, too, without effect on the forest: weights are not dropped (the rate is 0), and nothing counts positions.
IGNORED = {"attend", "dropout", "position_ids"}
# Root mean square difference of outputs, of their own: rounding over one layer, and far below what another formula makes.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.03, torch.float16: 0.004}

Options = Mapping[str, Any]
Replaced = Literal["blocks", "feed-forwards", "nothing"]
Rotary = tuple[Tensor, Tensor]


def fuse_modules(layers: nn.ModuleList, rotary: Rotary | None) -> list[Options | None]:
    """Replace the forward passes of modules in a model's layers where fused ones compute the same.

    Args:
        layers: of a model whose attention is registered with `AttentionInterface`, and hands on `attend`.
        rotary: cos and sin [1, n, d] each of n positions as the model hands them to its layers; None where it hands on others.

    Returns:
        For each layer, what its attention's module passes on where the layer is a plain block; else None. A plain block that is
        the last layer takes `rows` [M] of the pass, for which alone it then runs.
    """
    for module in list(layers.modules()):
        if is_plain_norm(module):
            _fuse_norm(module)
    for module in list(layers.modules()):
        if is_swiglu(module):
            _fuse_swiglu(module)
    blocks: list[Options | None] = []
    for layer in layers:
        attention = getattr(layer, "self_attn", None)
        options = None if rotary is None else plain_attention_options(attention, rotary)
        if rotary is not None and options is not None and is_plain_block(layer, options, rotary):
            _fuse_block(layer, options, last=layer is layers[-1])
            blocks.append(options)
            continue
        if options is not None:
            _fuse_attention(attention, options)
        blocks.append(None)
    return blocks


def is_ordinary(options: Options, head_dim: int) -> bool:
    """Return whether attention with these options is softmax(q k / sqrt(d)) v over all that is before."""
    scaling = options.get("scaling")
    others = [value for name, value in options.items() if name != "scaling"]
    return not any(others) and (scaling is None or math.isclose(scaling, head_dim**-0.5))


def replaced_in(layers: nn.ModuleList) -> Replaced:
    """Return what `fuse_modules` replaces in layers, norms left out, as far as their parts tell: weights may take no memory."""
    if all(_has_parts_of_block(layer) for layer in layers):
        return "blocks"
    return "feed-forwards" if any(_has_parts_of_swiglu(module) for module in layers.modules()) else "nothing"


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


# What modules are -------------------------------------------------------------------------------------------------------


def _has_parts_of_swiglu(module: Any) -> bool:
    parts = dict(module.named_children())
    linears = {name for name, part in parts.items() if isinstance(part, LINEARS)}
    activations = [type(part).__name__ for name, part in parts.items() if name not in linears]
    return linears in GATED and activations in (["SiLU"], ["SiLUActivation"])


def _has_parts_of_block(layer: Any) -> bool:
    parts = dict(layer.named_children())
    return (
        parts.keys() == BLOCK
        and PROJECTIONS <= {name for name, _ in parts["self_attn"].named_children()}
        and _has_parts_of_swiglu(parts["mlp"])
    )


@torch.no_grad()
def is_swiglu(module: Any) -> bool:
    """Return whether a module is down(silu(gate(x)) * up(x)), gate and up apart or stacked, by its parts and random numbers."""
    if not _has_parts_of_swiglu(module):
        return False
    x = _random_rows(module.gate_up_proj if hasattr(module, "gate_up_proj") else module.gate_proj, 6)
    return _is_close(run_swiglu(module, x, None), module(x))


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


@torch.no_grad()
def plain_attention_options(attention: Any, rotary: Rotary) -> Options | None:
    """Return what a module passes to attention beside queries, keys and values; None where it is not plain.

    Plain attention projects its input, norms heads of queries and keys or not, turns all of their dimensions by rotary positions,
    halves against halves, attends, and projects.
    """
    parts = dict(attention.named_children()) if isinstance(attention, nn.Module) else {}
    norms = parts.keys() - PROJECTIONS
    if (
        not PROJECTIONS <= parts.keys()
        or not all(isinstance(parts[name], LINEARS) for name in PROJECTIONS)
        or norms not in (set(), {"q_norm", "k_norm"})
        or list(attention.parameters(recurse=False))
        or not hasattr(attention, "config")
        or rotary[0].shape[-1] != getattr(attention, "head_dim", None)
        or not all(is_fused(parts[name]) and len(parts[name].weight) == attention.head_dim for name in norms)
        or "position_embeddings" not in inspect.signature(attention.forward).parameters
    ):
        return None
    x = 100.0 * _random_rows(
        attention.q_proj, rotary[0].shape[1]
    )  # so large that a module that clips its projections differs
    with _recording(attention) as recorded:
        ordinary = attention(x[None], position_embeddings=rotary, attention_mask=None, attend=mixing_attention)
    options = {name: value for name, value in recorded.items() if name not in IGNORED}
    if not options.keys() <= OPTIONS:
        return None
    fused = run_attention(attention, x, None, *_by_row(rotary), _attend_by(attention, options, mixing_attention))
    return options if isinstance(ordinary, tuple) and _is_close(fused, ordinary[0][0]) else None


@torch.no_grad()
def is_plain_block(layer: Any, options: Options, rotary: Rotary) -> bool:
    """Return whether a layer is x + attention(norm(x)), then x + SwiGLU(norm(x)), of plain attention with these options."""
    parts = {name for name, _ in layer.named_children()}
    if parts != BLOCK or list(layer.parameters(recurse=False)) or not is_swiglu(layer.mlp):
        return False
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if not all(map(is_fused, norms)) or "position_embeddings" not in inspect.signature(layer.forward).parameters:
        return False
    x = _random_rows(layer.self_attn.q_proj, rotary[0].shape[1])
    ordinary = layer(x[None], position_embeddings=rotary, attention_mask=None, attend=mixing_attention)
    fused = run_layer(layer, x, *_by_row(rotary), _attend_by(layer.self_attn, options, mixing_attention))
    return isinstance(ordinary, Tensor) and _is_close(fused, ordinary[0])


def is_fused(module: nn.Module) -> bool:
    """Return whether the forward pass of a module was replaced."""
    return "forward" in module.__dict__


def _eps_of(module: Any) -> float | None:
    return next((float(value) for name in ("variance_epsilon", "eps") if (value := getattr(module, name, None))), None)


def _random_rows(linear: Any, count: int) -> Tensor:
    """Draw inputs [count, in] of a linear, in whole weights or in 4 bits."""
    weight = linear.weight
    rows = torch.randn(count, linear.in_features, generator=torch.Generator().manual_seed(0))
    return rows.to(weight.packed.device if isinstance(linear, NF4Linear) else weight.device, weight.dtype)


def _by_row(rotary: Rotary) -> Rotary:
    """Return cos and sin [T, d] from [1, T, d] each."""
    return rotary[0][0], rotary[1][0]


def mixing_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    """Stand for attention: [n, H, d] that depends on queries, keys and values, each row's on another row's."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scale = q.float().square().mean().sqrt() * k.float().square().mean().sqrt()
    return v + v.flip(0) * ((q * k.roll(1, 0)).float() / scale).tanh().to(v)


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two modules' outputs for the same inputs differ by rounding."""
    difference = (ours.double() - theirs.double()).square().mean().sqrt()
    return ours.shape == theirs.shape and bool(
        difference <= TOLERANCE[ours.dtype] * theirs.double().square().mean().sqrt()
    )


@contextmanager
def _recording(attention: Any) -> Iterator[dict[str, Any]]:
    """Collect the keyword arguments that a module passes to the attention that its config names."""
    name, recorded = attention.config._attn_implementation, {}
    ordinary = ALL_ATTENTION_FUNCTIONS[name]

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        recorded.update(options)
        return ordinary(module, query, key, value, mask, **options)

    AttentionInterface.register(name, record)
    try:
        yield recorded
    finally:
        AttentionInterface.register(name, ordinary)


# Replacements -----------------------------------------------------------------------------------------------------------


def _attend_by(attention: Any, options: Options, attend: Any) -> AttendLayer:
    """Return attention q [M, H, d], k, v [T, Hkv, d] -> [M, H, d] by the function that transformers would call."""
    function = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]

    def attend_layer(*heads: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in heads)  # [1, heads, rows, d]
        return function(attention, query, key, value, None, attend=attend, **options)[0][0]

    return attend_layer


def _fuse_norm(module: Any) -> None:
    module.eps = _eps_of(module)  # where `project` reads it

    def forward(x: Tensor) -> Tensor:
        return rms_norm(x.reshape(-1, x.shape[-1]), module.weight, module.eps).view(x.shape)

    module.forward = forward


def _fuse_swiglu(module: Any) -> None:
    def forward(x: Tensor) -> Tensor:
        return run_swiglu(module, x.reshape(-1, x.shape[-1]), None, module.row_keys).view(*x.shape[:-1], -1)

    module.forward, module.row_keys = forward, None


def _fuse_attention(attention: Any, options: Options) -> None:
    def forward(
        hidden_states: Tensor, *, position_embeddings: Rotary, attend: Any, **others: Any
    ) -> tuple[Tensor, None]:
        cos, sin = _by_row(position_embeddings)
        by = _attend_by(attention, options, attend)
        return run_attention(attention, hidden_states[0], None, cos, sin, by, keys=attention.row_keys)[None], None

    attention.forward, attention.row_keys = forward, None


def _fuse_block(layer: Any, options: Options, *, last: bool) -> None:
    def forward(
        hidden_states: Tensor,
        *,
        position_embeddings: Rotary,
        attend: Any,
        rows: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        cos, sin = _by_row(position_embeddings)
        by = _attend_by(layer.self_attn, options, attend)
        inputs = (hidden_states[0], cos, sin, by, rows if last else None, layer.row_keys)
        if layer.recomputed and layer.training and torch.is_grad_enabled():
            return checkpoint(run_layer, layer, *inputs, use_reentrant=False)[None]
        return run_layer(layer, *inputs)[None]

    layer.forward, layer.row_keys, layer.recomputed = forward, None, False
