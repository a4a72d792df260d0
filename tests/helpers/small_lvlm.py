"""A small random LLaVA with grouped queries that likes to end sentences, and its prompts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.generation.generate import Prompt
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.recipes.base_checkpoint import LVLM_CHAT_TEMPLATE, train_tokenizer

TEXTS = ["USER: What is left of the red square? ASSISTANT: a blue circle. It is 3. There are 2.5 rings! No."]
IMAGES = {f"image-{number}": (17 + 5 * number, 40 - 6 * number) for number in range(4)}  # width, height
LIKED = {"</s>": 5.0, ".": 6.5, "3": 3.0, "!": 2.0}  # added to the logits, more or less


def write_small_lvlm(directory: Path) -> Any:
    """Returns transformers' model of the checkpoint."""
    tokenizer = train_tokenizer(TEXTS, 300)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=24,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=38,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.1 * drawn if "norm" in name and name.endswith("weight") else 0.35 * drawn)
        language = model.model.language_model
        # A channel that no layer reads or changes: what the head gives to it is a bias.
        language.embed_tokens.weight *= 4.0
        language.embed_tokens.weight[:, 0] = 20.0
        for layer in language.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight *= 3.0
                norm.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        for word, bias in LIKED.items():
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(word), 0] = bias / 2.5
        model.lm_head.weight[[0, 1, 3], 0] = -9.0  # padding, beginning, image: never said
    model.save_pretrained(directory)
    tokenizer.chat_template = LVLM_CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    size = {"height": 24, "width": 24}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(directory)
    return model


def load_image(key: str) -> Image.Image:
    width, height = IMAGES[key]
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


class SmallLVLM:
    """The model in a dtype, with features and prompts."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.model = load_lvlm(directory, dtype=dtype)
        self.features = ImageFeatures(self.model, load_image)

    def prompts(self) -> list[Prompt]:
        """Of different lengths, with none, one and two images."""
        asked: list[tuple[str, tuple[str, ...]]] = [
            ("What is left of the red square?", ("image-0",)),
            ("Why?", ("image-1",)),
            ("How many rings are there, and what is the colour of the largest of them?", ("image-2", "image-3")),
            ("What is red?", ()),
            ("Where is the circle?", ("image-0",)),
        ]
        return [
            Prompt(self.model.encode_prompt(question, [load_image(key) for key in images]), images, f"sample-{number}")
            for number, (question, images) in enumerate(asked)
        ]

    def logits(self, prompt: Prompt, tokens: Iterable[int]) -> Tensor:
        """Logits [n + 1, V] from the prompt's last position on, the whole sequence run anew."""
        row = np.array([*prompt.token_ids, *tokens])
        forest = Forest.of([Tree((Segment(row),), prompt.images)])
        with torch.no_grad():
            hidden = self.model(forest, self.features(prompt.images))[len(prompt.token_ids) - 1 :]
        return hidden @ self.model.decoder.head_weight.T

    def logprob(self, prompt: Prompt, tokens: Iterable[int]) -> float:
        ids = torch.tensor(list(tokens))
        return float(self.logits(prompt, ids)[:-1].log_softmax(-1).gather(1, ids[:, None]).sum())
