"""What the rooms above ask of a model: small protocols, which `LVLM`, `TextModel` and `Decoder` fulfil."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor, nn

from srcfast.attention.forest_attention import Attend
from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest
from srcfast.data.images import ImageFile
from srcfast.data.turns import Turn
from srcfast.models.head import Head


class DecoderShapes(Protocol):
    """The sizes of a decoder that decoding reads, as `DecoderConfig` names them."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def max_positions(self) -> int: ...  # of a prompt and its response


class TransformerDecoder(Protocol):
    """Embedding, layers, norm and head over a flat row of positions: `Decoder`."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    dropout_keys: Tensor | None  # [T], set before a forward pass whose adapters drop
    checkpoint_layers: int  # layers a group whose activations the backward pass recomputes; 0: none are recomputed
    plain_layers: bool  # blocks of RMS norms, rotary attention and SwiGLU, as generation's CPU decoder runs them
    is_handwritten: bool  # `Decoder`; else the general backbone's, which runs code of transformers around its layers
    has_states: bool  # whether decoding continues recurrent layers' states beside keys and values
    idle: bool  # it runs only to keep in step with ranks that have work

    @property
    def config(self) -> DecoderShapes: ...

    @property
    def cache_config(self) -> DecoderShapes: ...  # of the layers that have keys and values

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        ...

    @property
    def head(self) -> Head: ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, D]."""
        ...

    def embed_forest(self, forest: Forest) -> Any:
        """Embed a forest's tokens into what a pass begins with."""
        ...

    def rotary(self, positions: Tensor, dtype: Any) -> tuple[Tensor, Tensor]:
        """Compute cos and sin, [T, d] each."""
        ...

    def next_positions(self, forest: Forest, embedded: Any) -> list[int]:
        """Return the position that follows each prompt of a forest of prompts; `embedded` is the model's `embed` of it."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def get_submodule(self, target: str) -> nn.Module: ...

    def __call__(self, embeddings: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """Compute hidden states [T, D] after the final norm, or those of `rows` [M] alone: [M, D]."""
        ...


class HasDecoder(Protocol):
    """A model that can be trained by an adapter of its decoder: `LVLM` and `TextModel`."""

    path: Path  # of the base's checkpoint
    adapter_prefix: str  # of its layers' names in transformers
    adapter_path: Path | None  # of the saved adapter that it has
    lora_config: LoRAConfig  # once it has an adapter
    training: bool

    @property
    def decoder(self) -> TransformerDecoder: ...

    # Of torch.nn.Module.
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def get_submodule(self, target: str) -> nn.Module: ...
    def train(self, mode: bool = True) -> nn.Module: ...
    def eval(self) -> nn.Module: ...
    def __call__(self, *inputs: Any, **options: Any) -> Tensor: ...  # hidden states [T, D] of a forest


class VisionLanguageModel(HasDecoder, Protocol):
    """A model that answers questions about images: `LVLM`."""

    tokenizer: Any  # transformers'
    image_token_id: int
    end_token_id: int  # that ends a response in training
    end_tokens: frozenset[int]  # that end one in generation

    def encode_prompt(
        self,
        question: str,
        images: Sequence[Image.Image | ImageFile],
        sample_id: str | None = None,
        turns: Sequence[Turn] = (),
    ) -> np.ndarray:
        """Tokenize a prompt's turns and the generation prompt into [n], each image's placeholder at its full length."""
        ...

    def encode_response(self, text: str) -> np.ndarray:
        """Tokenize a response, then the end token, into [n]."""
        ...

    def response_tokens(self, prompt: np.ndarray, text: str, sample_id: str, field: str) -> np.ndarray:
        """Tokenize a response as `encode_response` does. Raises InputError where it spells a control token or is too long."""
        ...

    def decode(self, token_ids: Iterable[int]) -> str:
        """Turn tokens into text, without special ones."""
        ...

    def embed(self, forest: Forest, features: Mapping[str, Any]) -> Any:
        """Embed a forest's tokens, with the images' embeddings at their placeholders, into what `decoder` takes."""
        ...

    def __call__(self, forest: Forest, features: Mapping[str, Tensor], rows: Tensor | None = None) -> Tensor:
        """Compute hidden states [T, D] of a forest, or those of `rows` [M] alone: [M, D]."""
        ...
