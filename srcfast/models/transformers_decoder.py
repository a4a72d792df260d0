"""The general backbone: transformers' own language model on a packed forest, or on the rows of a decoding step.

Attention is registered with transformers' `AttentionInterface`; it hands each layer's queries, keys and values to the caller's
`attend`, which the hand-written `Decoder` calls as well. No mask function is registered under that name, so that transformers
builds no mask. Everything else of a layer (norms, rotary positions, gates, experts) is transformers' code.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from srcfast.attention.forest_attention import Attend
from srcfast.attention.options import CAUSAL, AttentionOptions
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import InputError, SrcfastError
from srcfast.models.checkpoint import naming_tensors
from srcfast.models.config_bounds import position_limit
from srcfast.models.fused_modules import Rotary, fuse_modules, is_ordinary
from srcfast.models.head import Head
from srcfast.models.recurrent import Mix, forest_mix, mix_by_caller, mixers
from srcfast.models.sharding import is_sharded
from srcfast.models.supported import ANOTHER_FAMILY, attention_layers
from srcfast.models.two_way import Ranges, TwoWay

ATTENTION = "srcfast_forest"  # its name in transformers
_CHECKPOINT = partial(checkpoint, use_reentrant=False)


@dataclass(frozen=True)
class TokenRow:
    """What a pass of the general backbone begins with; the hand-written one begins with embeddings.

    Attributes:
        token_ids: [T] int64.
        positions: [T], or [axes, T] for rotary positions by time, height, width; None: those of the caller.
        inputs: keyword arguments of transformers' model beside tokens and positions: encoded images.
        mix: how recurrent layers mix the row's tokens; None in models without such layers.
        two_way: ranges of rows that see each other in both directions, in models whose attention does that.
    """

    token_ids: Tensor
    positions: Tensor | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    mix: Mix | None = None
    two_way: Ranges = ()


@dataclass(frozen=True)
class BackboneShapes:
    """The sizes of a decoder that decoding and forecasts read."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    kv_shapes: tuple[tuple[int, int], ...] = ()  # of each layer with keys and values: their heads, and a head's size

    @classmethod
    def of(cls, config: Any) -> BackboneShapes:
        """Read a transformers text config; where layers differ, the first one's sizes."""
        heads = config.num_attention_heads
        if getattr(config, "is_heterogeneous", False):
            config = config.per_layer_config[0]
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),
            max_positions=position_limit(config),
        )


class TransformersDecoder(nn.Module):
    """The language model of one of transformers' models, with the interface of the hand-written `Decoder`.

    Args:
        model: a conditional-generation model; only its language model and head are submodules of the decoder.
    """

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module
    plain_layers: bool  # see `Decoder`
    is_handwritten = False
    idle = False  # within a pass that only keeps in step with other ranks

    def __init__(self, model: Any) -> None:
        super().__init__()
        text = text_model(model)
        text.set_attn_implementation(ATTENTION)
        model.config.get_text_config()._attn_implementation = ATTENTION
        self.text_config = model.config.get_text_config()
        self.config = BackboneShapes.of(self.text_config)
        for name, part in text.named_children():  # embed_tokens, layers, norm, rotary_emb, ...
            setattr(self, name, part)
        self.lm_head: nn.Module = model.get_output_embeddings()
        # By number: the position of an attention layer among those that have keys and values.
        self.cache_index = {
            layer: index for index, layer in enumerate(attention_layers(model.config.get_text_config()))
        }
        recurrent = mixers(self.layers)
        if len(recurrent) + len(self.cache_index) != len(self.layers):
            raise InputError(
                field="text_config.layer_types",
                expected="layers of attention, gated DeltaNet or short convolutions",
                found=f"{len(self.layers) - len(self.cache_index) - len(recurrent)} of another kind",
                fix=ANOTHER_FAMILY,
            )
        self.has_states = bool(recurrent)  # whether decoding continues states beside keys and values
        for layer in self.layers:
            if mixers(layer):
                mix_by_caller(layer)
        # Logits are the scaled hidden states times the head, under the soft cap; `models.self_check` finds both.
        self.logit_scale = 1.0
        self.softcap: float | None = None
        self.two_way: TwoWay | None = None  # which of a prompt's tokens see each other in both directions
        self.kv_shapes: tuple[tuple[int, int], ...] = ()  # set by `observe_layers`
        self.checkpoint_layers = 0
        self.dropout_keys: Tensor | None = None
        self._whole = [model]  # in a list: as a submodule its vision tower would be the decoder's, too
        self.num_axes = _num_axes(model)
        blocks = fuse_modules(self.layers, self._sample_rotary())
        # Features of the tower that the model adds behind its first layers, for all rows.
        deep = getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ()
        self.selects_rows = blocks[-1] is not None and len(deep) < len(
            self.layers
        )  # the last layer runs for them alone
        self.plain_layers = all(
            options is not None and is_ordinary(options, self.config.head_dim) for options in blocks
        )

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """Compute cos and sin of positions [T], [T, d] each, of a model with plain layers."""
        like = torch.empty(1, 1, 1, dtype=dtype, device=positions.device)
        cos, sin = self.rotary_emb(like, self._by_axes(positions)[..., None, :])
        return cos[0], sin[0]

    def _sample_rotary(self) -> Rotary | None:
        """Return cos and sin [1, n, d] of some positions; None where the layers get other ones."""
        rotary = getattr(self, "rotary_emb", None)
        if rotary is None or list(inspect.signature(rotary.forward).parameters) != ["x", "position_ids"]:
            return None
        weight = self.embed_tokens.weight
        positions = 7 * torch.arange(6, device=weight.device)
        cos, sin = rotary(weight[:1][None], self._by_axes(positions)[..., None, :])
        return (cos, sin) if cos.ndim == 3 else None

    def _by_axes(self, positions: Tensor) -> Tensor:
        """Return positions [T] or [axes, T] as the model takes them."""
        return positions.expand(self.num_axes, -1) if self.num_axes and positions.ndim == 1 else positions

    def _prepare_training_pass(self) -> None:
        """Hand adapters their rows' dropout keys, and let the layers of all groups but the last save their inputs alone.

        transformers' modules pass no keys to their linears, and its layers are recomputed one by one. A group of the hand-written
        decoder saves one input; but the groups' sizes stand for how many layers are recomputed.
        """
        for module in self.layers.modules():
            if hasattr(module, "row_keys"):
                module.row_keys = self.dropout_keys
        count, every = len(self.layers), self.checkpoint_layers
        recomputed = count - (count % every or every) if every else 0
        for index, layer in enumerate(self.layers):
            if hasattr(layer, "recomputed"):  # a plain block that is run by `fused_modules`
                layer.recomputed = index < recomputed
            else:
                layer.gradient_checkpointing = index < recomputed
                layer._gradient_checkpointing_func = _CHECKPOINT

    @property
    def cache_config(self) -> BackboneShapes:
        """Return the sizes of the layers that have keys and values."""
        return replace(self.config, num_layers=len(self.kv_shapes), kv_shapes=self.kv_shapes)

    @property
    def head(self) -> Head:
        """Return the head."""
        return Head(self.head_weight, self.softcap)

    @property
    def head_weight(self) -> Tensor:
        """Return the head's weight [V, D]."""
        weight = self.lm_head.weight
        assert isinstance(weight, Tensor)
        return weight

    def embed(self, token_ids: Tensor) -> TokenRow:
        """Return tokens [T] int64 without images as what a pass begins with."""
        return TokenRow(token_ids)

    def embed_forest(self, forest: Forest) -> TokenRow:
        """Return a forest's tokens, without images, as what a pass begins with."""
        return TokenRow(forest.token_ids, mix=forest_mix(forest) if self.has_states else None)

    def next_positions(self, forest: Forest, embedded: TokenRow) -> list[int]:
        """Return the position that follows each prompt of a forest of prompts; `embedded` is the model's `embed` of it."""
        if embedded.positions is None:
            return [tree.num_tokens for tree in forest.trees]
        last = [
            starts[0] + tree.num_tokens - 1 for starts, tree in zip(forest.segment_start, forest.trees, strict=True)
        ]
        return (embedded.positions.amax(dim=0).cpu()[last] + 1).tolist()

    @torch.no_grad()
    def observe_layers(self) -> None:
        """Run one token to see the shapes of each layer's keys and values, and which layers share them, for decoding's cache."""
        # They stay alive, and a single token's heads are contiguous as they are: so equal addresses mean shared keys.
        stored: list[Tensor] = []
        cache_index = {}

        def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions = CAUSAL, /) -> Tensor:
            addresses = [other.data_ptr() for other in stored]
            if k.data_ptr() not in addresses:
                stored.append(k)
                addresses.append(k.data_ptr())
            cache_index[layer] = addresses.index(k.data_ptr())
            return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

        token = torch.zeros(1, dtype=torch.int64, device=self.head_weight.device)
        attention = list(self.cache_index)
        self.cache_index = {layer: index for index, layer in enumerate(attention)}
        self(
            self.embed_forest(Forest.of([Tree((Segment(np.zeros(1, dtype=np.int64)),))]).to(token.device)),
            token,
            observe,
        )
        self.cache_index = {layer: cache_index[index] for index, layer in enumerate(attention)}
        self.kv_shapes = tuple((k.shape[1], k.shape[2]) for k in stored)

    def save(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        """Write the whole model's weights as transformers does, in `dtype`, by default the model's."""
        model = self._whole[0]
        weights = None if dtype is None else {name: value.to(dtype) for name, value in model.state_dict().items()}
        with naming_tensors(directory):
            model.save_pretrained(directory, state_dict=weights)

    def forward(self, row: TokenRow, positions: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """Compute hidden states [T, D] after the final norm, or those of `rows` [M] alone: [M, D].

        Args:
            row: tokens, and what images add.
            positions: [T], for a row without positions of its own.
            attend: called in each layer.
            rows: [M] int64 ascending.
        """
        if self.training:  # only then do layers drop and recompute
            self._prepare_training_pass()
        positions = self._by_axes(positions if row.positions is None else row.positions)
        layers: set[int] = set()

        # Without options, the CPU's decoder calls it: its layers have none.
        def record(
            layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, softcap: float | None = None
        ) -> Tensor:
            layers.add(layer)
            if self.two_way is not None:
                options = self.two_way.options(row.two_way, window, softcap)
            else:
                options = AttentionOptions(window, softcap)
            return attend(self.cache_index[layer], q, k, v, options)

        output = self._whole[0].base_model(
            input_ids=row.token_ids[None],
            position_ids=positions[..., None, :],
            use_cache=False,
            attend=record,
            **({"mix": row.mix} if self.has_states else {}),
            **({"rows": rows} if self.selects_rows else {}),
            **row.inputs,
        )
        if len(layers) != len(self.cache_index):
            raise SrcfastError(
                f"{type(self._whole[0]).__name__}: expected all {len(self.cache_index)} layers to attend through transformers' "
                f"AttentionInterface, found {len(layers)}. Fix: {ANOTHER_FAMILY}"
            )
        hidden = output.last_hidden_state[0]  # [T, D], or of rows alone
        if is_sharded(self):
            hidden = hidden.clone()  # FSDP puts hooks on what a module returns, which a view may lose
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale
        return hidden if rows is None or self.selects_rows else hidden.index_select(0, rows)


def text_model(model: Any) -> Any:
    """Return the language model of a conditional-generation model of transformers.

    Raises:
        InputError: it has none that is made of layers.
    """
    base = model.base_model
    for name in ("language_model", "text_model"):
        if hasattr(getattr(base, name, None), "layers"):
            return getattr(base, name)
    if hasattr(base, "layers"):
        return base
    raise InputError(
        field="model_type",
        expected="a model with a language model of layers",
        found=model.config.model_type,
        fix="choose another checkpoint",
    )


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    attend: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer, [1, T, H, d], from query [1, H, T, d], key and value [1, Hkv, T, d]."""
    assert attend is not None and attention_mask is None, "no mask function is registered under this name"
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [T, heads, d]
    if scaling is not None and not math.isclose(scaling, q.shape[-1] ** -0.5):
        q = q * (scaling * q.shape[-1] ** 0.5)
    return attend(module.layer_idx, q, k, v, sliding_window, softcap)[None], None


AttentionInterface.register(ATTENTION, _attention)


@torch.no_grad()
def tree_positions(model: Any, token_ids: Tensor, image_token_id: int, sizes: dict[str, Tensor]) -> Tensor:
    """Compute the rotary positions [axes, n] of a prompt by the model's own `get_rope_index`.

    Args:
        token_ids: [n] on the host.
        sizes: the images' sizes as the processor states them, such as `image_grid_thw` [images, 3].
    """
    types = (token_ids == image_token_id).int()[None]
    positions, _ = model.base_model.get_rope_index(token_ids[None], mm_token_type_ids=types, **sizes)
    return positions[:, 0]


def _num_axes(model: Any) -> int:
    """Return how many rotary positions a token has, such as 3 by time, height and width; 0 in models that count tokens alone."""
    if not hasattr(model.base_model, "get_rope_index"):
        return 0
    return len(tree_positions(model, torch.zeros(1, dtype=torch.int64), -1, {}))
