"""Random models with the layers of published ones, but narrow: as transformers builds them from their config files."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from helpers.published_configs import CONFIGS
from srcfast.attention.forest_attention import forest_attend
from srcfast.data.forest import Forest
from srcfast.models.transformers_decoder import TransformersDecoder

TEXT = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "num_hidden_layers": 1,
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
}


def shrunk_model(name: str) -> Any:
    """Build a published model with 8 layers of 256 and a tower of one layer; random weights."""
    config = AutoConfig.from_pretrained(CONFIGS / name)
    text, vision = config.get_text_config(), config.vision_config
    heads = {"head_dim": 64} if hasattr(text, "head_dim") else {}
    if types := getattr(text, "layer_types", None):
        text.layer_types = types[:8]
    if hasattr(text, "linear_num_key_heads"):  # at their width of 128, as many as there are in a layer of 2560
        heads |= {"hidden_size": 320, "intermediate_size": 1152, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    for part, sizes in ((text, TEXT | heads), (vision, TOWER)):
        for field, value in sizes.items():
            if hasattr(part, field):
                setattr(part, field, value)
    for field, value in {
        "out_hidden_size": text.hidden_size,
        "deepstack_visual_indexes": [0],
        "fullatt_block_indexes": [0],
    }.items():
        if hasattr(vision, field):
            setattr(vision, field, value)
    rope = getattr(text, "rope_parameters", None)
    if rope and "mrope_section" in rope:
        half = int(64 * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return AutoModelForImageTextToText.from_config(config).requires_grad_(False)


class ShrunkLVLM(nn.Module):
    """The language model of a shrunk model on a forest of text."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.decoder = TransformersDecoder(shrunk_model(name).to(dtype))

    def forward(self, forest: Forest, rows: torch.Tensor | None = None) -> torch.Tensor:
        return self.decoder(self.decoder.embed_forest(forest), forest.positions, forest_attend(forest, rows=rows), rows)
