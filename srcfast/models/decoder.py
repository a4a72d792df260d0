"""The hand-written decoder: Llama, Mistral, Qwen2 and Qwen3 shapes.

It is independent of masks, caches and packing: `attend` takes the queries, keys and values of each layer and returns the
attended values. Parameters are named as Hugging Face names them below `model.`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from srcfast.attention.forest_attention import Attend
from srcfast.data.forest import Forest
from srcfast.errors import InputError
from srcfast.models.config_bounds import position_limit
from srcfast.models.head import Head
from srcfast.models.lora import project, project_swiglu
from srcfast_kernels import rms_norm, rope

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def is_handwritten_text(config: Any) -> bool:
    """Return whether the hand-written decoder has the architecture of a transformers text config, and its attention no window."""
    return config.model_type in ARCHITECTURES and _window(config) is None


def _window(config: Any) -> int | None:
    """Return the window of a text config's attention, None where it covers all positions."""
    window: int | None = getattr(config, "sliding_window", None)
    windowed = window is not None and getattr(config, "use_sliding_window", config.model_type == "mistral")
    return window if windowed and window < config.max_position_embeddings else None


@dataclass(frozen=True)
class DecoderConfig:
    """Shapes and constants of a decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 2048

    @classmethod
    def from_huggingface(cls, config: Any) -> DecoderConfig:
        """Read a transformers text config. Raises InputError for an architecture that is not one of the four."""
        kind = config.model_type
        if kind not in ARCHITECTURES:
            raise InputError(
                field="model_type",
                expected="llama, mistral, qwen2 or qwen3",
                found=kind,
                fix="choose a checkpoint of one of these families",
            )
        if config.hidden_act != "silu":
            raise InputError(field="hidden_act", expected="silu", found=config.hidden_act)
        if (window := _window(config)) is not None:
            raise InputError(
                field="sliding_window",
                expected="full attention with the hand-written backbone",
                found=f"a window of {window} of {config.max_position_embeddings} positions",
                fix="set model.backbone to auto or transformers, which runs windows",
            )
        scaling = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
        theta = scaling.pop("rope_theta", None) or getattr(config, "rope_theta", None) or 10000.0
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        if config.num_attention_heads % kv_heads:
            raise InputError(
                field="num_key_value_heads",
                expected=f"a divisor of the {config.num_attention_heads} attention heads",
                found=kv_heads,
            )
        attention_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=kv_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=float(theta),
            rope_scaling=scaling or None,
            tie_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=kind == "qwen2" or attention_bias,
            output_bias=kind != "qwen2" and attention_bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=kind == "qwen3",
            max_positions=position_limit(config),
        )


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a weight [D]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Projections, and norms of queries and keys where the model has them; see `run_attention`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm: nn.Module = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm: nn.Module = RMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()


class MLP(nn.Module):
    """SwiGLU feed-forward; see `run_swiglu`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)


class Layer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layer: int,
        attend: Attend,
        rows: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        return run_layer(self, x, cos, sin, partial(attend, layer), rows, keys)


# What a layer computes, from any module with its parts by these names: transformers' layers of the same form have them, too.

AttendLayer = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [M, H, d], k and v [T, Hkv, d] -> [M, H, d]


def run_layer(
    layer: Any,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: AttendLayer,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Run a pre-norm block from x [T, D] into [T, D], or its rows [M] alone into [M, D].

    Args:
        layer: has `input_layernorm`, `self_attn`, `post_attention_layernorm` and `mlp`; norms have `weight` and `eps`.
        cos, sin: [T, d] each.
        keys: [T], see `Decoder.dropout_keys`.
    """
    attended = run_attention(layer.self_attn, x, layer.input_layernorm, cos, sin, attend, rows, keys)
    if rows is not None:
        x, keys = x[rows], None if keys is None else keys[rows]
    x = x + attended
    return x + run_swiglu(layer.mlp, x, layer.post_attention_layernorm, keys)


def run_attention(
    attention: Any,
    x: Tensor,
    norm: nn.Module | None,
    cos: Tensor,
    sin: Tensor,
    attend: AttendLayer,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Project, norm queries and keys where there are norms for them, rotate, attend and project, as `run_layer`."""
    if rows is None:
        projected = project(x, attention.q_proj, attention.k_proj, attention.v_proj, norm=norm, keys=keys)
        query_keys, query_angles = keys, (cos, sin)
    else:
        query_keys = None if keys is None else keys[rows]
        queries = project(x[rows], attention.q_proj, norm=norm, keys=query_keys)
        projected = (*queries, *project(x, attention.k_proj, attention.v_proj, norm=norm, keys=keys))
        query_angles = (cos[rows], sin[rows])
    q, k, v = (
        values.view(values.shape[0], -1, attention.head_dim) for values in projected
    )  # [M, H, d], [T, Hkv, d] twice
    if getattr(attention, "q_norm", None) is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    attended = attend(rope(q, *query_angles), rope(k, cos, sin), v).reshape(q.shape[0], -1)  # [M, H * d]
    return project(attended, attention.o_proj, keys=query_keys)[0]


def run_swiglu(mlp: Any, x: Tensor, norm: nn.Module | None, keys: Tensor | None = None) -> Tensor:
    """Compute down(silu(gate(x)) * up(x)) of x [T, D], normed before where there is a norm; gate and up may be stacked."""
    if hasattr(mlp, "gate_up_proj"):
        gate, up = project(x, mlp.gate_up_proj, norm=norm, keys=keys)[0].chunk(2, dim=-1)
    else:
        gate, up = project(x, mlp.gate_proj, mlp.up_proj, norm=norm, keys=keys)  # [T, F] each
    return project_swiglu(gate, up, mlp.down_proj, keys)


class Decoder(nn.Module):
    """Embedding, layers, final norm and head, over a flat row of T positions.

    With `checkpoint_layers` n > 0 (Chen et al., 2016, arXiv 1604.06174) only each n-th layer's input is saved for backward,
    which recomputes the layers between two of them, dropout included: the same gradients for less memory.

    Adapters with dropout need `dropout_keys`, [T] int64 on the device, set before each forward pass: a row's key, the layer and
    the column decide what is dropped (`srcfast_kernels.dropout`).
    """

    inverse_frequencies: Tensor
    plain_layers = True  # blocks of RMS norms, rotary attention and SwiGLU, as generation's CPU decoder runs them
    is_handwritten = True
    has_states = False  # decoding continues nothing but keys and values
    idle = False  # within a pass that only keeps in step with other ranks

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_layers = 0
        self.dropout_keys: Tensor | None = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.set_frequencies()

    def set_frequencies(self) -> None:
        """(Re)compute the rotary frequencies [d/2], which checkpoints do not hold."""
        frequencies, self.rope_factor = rotary_frequencies(self.config)
        self.register_buffer("inverse_frequencies", frequencies.to(self.embed_tokens.weight.device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """Move or cast, but leave the frequencies in fp32: rounded to bf16 they would turn far positions by radians."""
        super()._apply(fn, recurse)
        self.set_frequencies()
        return self

    @property
    def cache_config(self) -> DecoderConfig:
        """Return the sizes of what is cached in decoding."""
        return self.config

    @property
    def head(self) -> Head:
        """Return the head."""
        return Head(self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """Return the head's weight [V, D]: the embedding's where the two are tied."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embed tokens [T] int64 into [T, D]."""
        return self.embed_tokens(token_ids)

    def embed_forest(self, forest: Forest) -> Tensor:
        """Embed a forest's tokens into [T, D]."""
        return self.embed(forest.token_ids)

    def next_positions(self, forest: Forest, embedded: Tensor) -> list[int]:
        """Return the position that follows each prompt of a forest of prompts."""
        return [tree.num_tokens for tree in forest.trees]

    def forward(self, embeddings: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """Compute hidden states [T, D] after the final norm, from embeddings [T, D] at positions [T].

        Args:
            attend: called in each layer; with `rows` the last layer passes it the queries of these rows alone.
            rows: [M] int64 ascending, each once: the rows to return, [M, D], equal except for rounding. The last layer
                computes keys and values of all rows, everything else for these.
        """
        cos, sin = self.rotary(positions, embeddings.dtype)
        x, keys = embeddings, self.dropout_keys
        count = len(self.layers)
        group = self.checkpoint_layers or count
        for start in range(0, count, group):
            layers = range(start, min(start + group, count))
            # Checkpointing the last group would not lower the peak: any group needs as much while it is recomputed.
            if layers.stop < count and torch.is_grad_enabled():
                x = checkpoint(self._run, layers, x, cos, sin, attend, None, keys, use_reentrant=False)
            else:
                x = self._run(layers, x, cos, sin, attend, rows, keys)
        return self.norm(x)

    def _run(
        self,
        layers: range,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        rows: Tensor | None,
        keys: Tensor | None,
    ) -> Tensor:
        """Run layers in turn; the decoder's last one for `rows` alone."""
        for index in layers:
            layer_rows = rows if index == len(self.layers) - 1 else None
            x = self.layers[index](x, cos, sin, index, attend, layer_rows, keys)
        return x

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute cos and sin, [T, d] each, from angles in fp32 (fp64 for an fp64 model) whatever the model's dtype."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        angles = positions.to(exact)[:, None] * self.inverse_frequencies.to(exact)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.rope_factor).to(dtype), (angles.sin() * self.rope_factor).to(dtype)


def rotary_frequencies(config: DecoderConfig) -> tuple[Tensor, float]:
    """Compute inverse frequencies [d/2] and the factor on cos and sin, under the config's scaling.

    Scalings: default, linear, and llama3 (Llama 3.1's interpolation by wavelength).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / scaling["factor"], 1.0
    if kind != "llama3":
        raise InputError(
            field="rope_scaling", expected="default, linear or llama3", found=kind, fix="choose another checkpoint"
        )
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    weight = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)  # of the unscaled frequency
    return frequencies * weight + frequencies / factor * (1.0 - weight), 1.0
