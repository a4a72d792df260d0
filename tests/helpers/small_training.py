"""Small decoders with an adapter, random trees, and one pass of training over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srcfast.attention.forest_attention import forest_attend
from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.logit_rows import response_logit_rows
from srcfast.models.decoder import Decoder, DecoderConfig
from srcfast.models.dropout_keys import dropout_keys, dropping, drops
from srcfast.models.lora import add_lora
from srcfast.models.quantized import NF4Linear, quantize_linears
from srcfast_kernels import linear_logprob

BASE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_layers": 6,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
# The shapes that are run: each differs in what a layer keeps.
SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "as many keys as queries": {"num_kv_heads": 4, "intermediate_size": 400},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "norms of queries and keys": {"qk_norm": True, "head_dim": 24},
    "tied": {"tie_embeddings": True},
}


class SmallModel(nn.Module):
    """A decoder that is frozen but for its adapter, if it has one."""

    def __init__(
        self, shape: dict[str, Any], lora: LoRAConfig | None, dtype: torch.dtype = torch.float32, quantize: bool = False
    ) -> None:
        super().__init__()
        self.decoder = Decoder(DecoderConfig(**(BASE | shape)))
        weights = dict(self.decoder.named_parameters())
        if quantize:
            quantize_linears(self.decoder)
        self.decoder.to(dtype)
        for name, module in self.decoder.named_modules():
            if isinstance(module, NF4Linear):
                module.set_weight(weights[f"{name}.weight"].detach().to(dtype))
        self.requires_grad_(False)
        if lora is not None:
            add_lora(self, lora)

    def forward(self, forest: Forest, rows: Tensor | None = None) -> Tensor:
        embeddings = self.decoder.embed(forest.token_ids)
        wanted = None if rows is None else rows.to(embeddings.device)
        return self.decoder(embeddings, forest.positions, forest_attend(forest, rows=rows), wanted)


def random_trees(rng: np.random.Generator, count: int, prompt: int, response: int, leaves: int) -> list[Tree]:
    """Prompts of up to `prompt` tokens with `leaves` responses of up to `response`; none shorter than half of it."""

    def segment(most: int, parent: int = -1) -> Segment:
        return Segment(rng.integers(0, 300, rng.integers(most // 2, most + 1)), parent)

    return [Tree((segment(prompt), *(segment(response, 0) for _ in range(leaves)))) for _ in range(count)]


def run(model: SmallModel, forest: Forest, on_loss: Callable[[], None] = lambda: None) -> None:
    """Forward and backward of the responses' log-probabilities; `on_loss` in between."""
    rows, host = response_logit_rows(forest), forest.host or forest
    found = [host.target_rows(i, range(1, len(tree.segments))) for i, tree in enumerate(forest.trees)]
    targets = torch.cat([own for _, own in found]).to(forest.token_ids.device)
    places = torch.searchsorted(rows, torch.cat([own for own, _ in found])).to(targets.device)
    keys = dropout_keys(forest, 0, 0, range(len(forest.trees))) if drops(model) else None
    with dropping(model.decoder, keys):
        hidden = model(forest, rows)
    logps = linear_logprob(hidden.index_select(0, places), model.decoder.head_weight, targets)
    on_loss()
    logps.sum().backward()
