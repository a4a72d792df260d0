"""A decoder's forward pass for inference on the CPU, in fp32.

Its products are oneDNN's, which uses the widest vectors of any maker's CPU (PyTorch's ordinary fp32 products are MKL's: on AMD's
CPUs half as fast) and which applies residuals, SiLU and the gate's product while it writes its result. Queries, keys and values
come from one product. It computes the same function as `models.decoder.Decoder`; a test compares the two. What the general
backbone's models do around their layers is code of transformers: there the two passes are compared each time one is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srcfast.attention.forest_attention import Attend
from srcfast.models.fused_modules import mixing_attention
from srcfast.models.lora import LoRALinear
from srcfast.models.protocols import TransformerDecoder

FEW_ROWS = 8  # below, MKL is faster
ROWS = 8  # of which products have a multiple
AGREEMENT = 1e-4  # of hidden states: rounding in fp32 over tens of layers, and far below what another formula makes

Affine = tuple[Tensor, Tensor | None]  # weight [out, in], bias [out]
Forward = Callable[
    [Tensor, Tensor, Attend], Tensor
]  # (embeddings [T, D], positions [T], attend) -> hidden states [T, D]


@dataclass(frozen=True)
class LayerWeights:
    """One block; `qkv` stacks the rows of the three projections."""

    input_norm: Tensor
    qkv: Affine
    q_norm: Tensor | None  # [d]
    k_norm: Tensor | None  # [d]
    output: Affine
    mlp_norm: Tensor
    gate: Affine
    up: Affine
    down: Affine


class CPUDecoder:
    """A callable like `Decoder`. Build it by `of` within `folded_lora`: it reads the weights as they are then."""

    def __init__(self, decoder: TransformerDecoder, layers: list[LayerWeights]) -> None:
        self.layers = layers
        self.embed = decoder.embed_tokens
        self.rotary = decoder.rotary
        self.norm = decoder.norm.weight
        self.head: Affine = (decoder.head_weight, None)
        self.eps = decoder.config.rms_norm_eps
        self.head_dim = decoder.config.head_dim
        self.heads, self.kv_heads = decoder.config.num_heads, decoder.config.num_kv_heads

    @classmethod
    def of(cls, decoder: TransformerDecoder) -> CPUDecoder | None:
        """Build it; return None for other layers, no fp32 on a CPU, 4-bit weights, or an adapter that is not folded."""
        weight = decoder.head_weight
        if (
            not decoder.plain_layers
            or weight.is_cuda
            or weight.dtype != torch.float32
            or not torch.backends.mkldnn.is_available()
        ):
            return None
        layers = []
        for layer in decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
            q, k, v, output = (_affine(linear) for linear in linears)
            gate, up, down = (_affine(linear) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
            if q is None or k is None or v is None or output is None or gate is None or up is None or down is None:
                return None
            layers.append(
                LayerWeights(
                    input_norm=layer.input_layernorm.weight,
                    qkv=_stack(q, k, v),
                    q_norm=_norm_weight(attention, "q_norm"),
                    k_norm=_norm_weight(attention, "k_norm"),
                    output=output,
                    mlp_norm=layer.post_attention_layernorm.weight,
                    gate=gate,
                    up=up,
                    down=down,
                )
            )
        fast = cls(decoder, layers)
        return fast if decoder.is_handwritten or fast._agrees_with(decoder) else None

    def _agrees_with(self, decoder: TransformerDecoder) -> bool:
        """Return whether the decoder makes of some tokens what this makes of them, but for rounding."""
        token_ids = torch.arange(2 * FEW_ROWS) * 7 % len(decoder.head_weight)
        positions = torch.arange(2 * FEW_ROWS) * 5
        with torch.no_grad():
            expected = decoder(decoder.embed(token_ids), positions, mixing_attention)
            difference = self(self.embed(token_ids), positions, mixing_attention) - expected
        return bool(difference.norm() <= AGREEMENT * expected.norm())

    def __call__(self, embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Compute hidden states [T, D] after the final norm, from embeddings [T, D] at positions [T]."""
        count = len(embeddings)
        cos, sin = (angles[:, None] for angles in self.rotary(positions, embeddings.dtype))  # [T, 1, d]
        x = _padded(embeddings)
        for index in range(len(self.layers)):
            x = self.run_layer(index, x, cos, sin, attend)
        return self._norm(x[:count], self.norm)

    def run_layer(self, index: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Run a block on x [at least T, D], of which the first T rows count; cos and sin are [T, 1, d]."""
        layer, count = self.layers[index], len(cos)
        q, k, v = self._heads(layer, x, cos, sin)
        attended = _padded(attend(index, q, k, v).reshape(count, -1))
        x = _product_with(attended, layer.output, x, "add")
        normed = self._norm(x, layer.mlp_norm)
        gated = _product_with(normed, layer.up, _silu_product(normed, layer.gate), "mul")
        return _product_with(gated, layer.down, x, "add")

    def run_within(self, decoder: TransformerDecoder, embedded: Any, positions: Tensor, attend: Attend) -> Tensor:
        """Run a decoder of the general backbone, for which this was built, with this one's layers in place of its own."""
        ordinary = [layer.forward for layer in decoder.layers]

        def forward(index: int, hidden_states: Tensor, *, position_embeddings: Any, attend: Attend, **_: Any) -> Tensor:
            cos, sin = (angles[0, :, None] for angles in position_embeddings)  # [T, 1, d]
            return self.run_layer(index, _padded(hidden_states[0]), cos, sin, attend)[None, : len(cos)]

        try:
            for index, layer in enumerate(decoder.layers):
                layer.forward = partial(forward, index)
            return decoder(embedded, positions, attend)
        finally:
            for layer, before in zip(decoder.layers, ordinary, strict=True):
                layer.forward = before

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits [R, V] from hidden states [R, D]."""
        return _product(_padded(hidden), self.head)[: len(hidden)]

    def _heads(self, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries [T, H, d] and keys [T, Hkv, d], rotated by their positions, and values [T, Hkv, d]."""
        projected = _product(self._norm(x, layer.input_norm), layer.qkv)[: len(cos)].view(len(cos), -1, self.head_dim)
        count = self.heads + self.kv_heads
        both = projected[:, :count]  # queries and keys, which are rotated together
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = both[:, : self.heads], both[:, self.heads :]
            both = torch.cat((self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)), dim=1)
        half = self.head_dim // 2
        rotated = both * cos
        rotated[..., :half].addcmul_(both[..., half:], sin[..., :half], value=-1.0)
        rotated[..., half:].addcmul_(both[..., :half], sin[..., half:])
        return rotated[:, : self.heads], rotated[:, self.heads :], projected[:, count:]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return (x * inverse).mul_(weight)


def _norm_weight(attention: nn.Module, name: str) -> Tensor | None:
    """Return the weight [d] of a norm of queries or keys, None where the model has none."""
    weight = getattr(getattr(attention, name, None), "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _affine(linear: nn.Module) -> Affine | None:
    """Return the fp32 weight and the bias of a linear layer; None for other dtypes, or a layer with an active adapter."""
    if isinstance(linear, LoRALinear):
        if linear.active:
            return None
        linear = linear.base
    weight = linear.weight
    return (weight, linear.bias) if isinstance(weight, Tensor) and weight.dtype == torch.float32 else None


def _stack(*affines: Affine) -> Affine:
    """Stack the rows of linears of one input; all of them have a bias, or none."""
    biases = [bias for _, bias in affines if bias is not None]
    return torch.cat([weight for weight, _ in affines]), torch.cat(biases) if len(biases) == len(affines) else None


def _padded(x: Tensor) -> Tensor:
    """Append rows of zeros to x [T, D], up to a multiple of ROWS.

    Rows leave a batch one by one, and oneDNN compiles its products for each number of rows, of which it keeps few.
    """
    missing = -len(x) % ROWS
    return F.pad(x, (0, 0, 0, missing)) if missing and len(x) >= FEW_ROWS else x


def _product(x: Tensor, affine: Affine) -> Tensor:
    if len(x) < FEW_ROWS:
        return F.linear(x, *affine)
    return torch.ops.mkldnn._linear_pointwise(x, *affine, "none", [], "")


def _silu_product(x: Tensor, affine: Affine) -> Tensor:
    if len(x) < FEW_ROWS:
        return F.silu(F.linear(x, *affine), inplace=True)
    return torch.ops.mkldnn._linear_pointwise(x, *affine, "swish", [], "")


def _product_with(x: Tensor, affine: Affine, other: Tensor, operation: str) -> Tensor:
    """Compute the product, plus or times `other`."""
    if len(x) < FEW_ROWS:
        product = F.linear(x, *affine)
        return product.add_(other) if operation == "add" else product.mul_(other)
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, *affine, operation)
