"""Random checkpoints of a few thousand weights, written by transformers, and its logits as the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.recipes.base_checkpoint import LVLM_CHAT_TEMPLATE, train_tokenizer

TEXTS = ["USER: What is left of the red square? ASSISTANT: a blue circle", "There are 3 small rings. It is 2.5 high."]
SIDE = 24  # pixels of the vision towers, in 3 x 3 patches
PINPOINTS = [[24, 48], [48, 24], [48, 48], [24, 72], [72, 24]]


@cache
def _trained_tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300).backend_tokenizer.to_str()


def tokenizer() -> PreTrainedTokenizerFast:
    """As srcfast.recipes.base_checkpoint makes it."""
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=2048,
    )


def text_config(kind: str = "llama", **changes: Any) -> Any:
    family = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind]
    settings = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 24,
        "intermediate_size": 38,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **({"sliding_window": None} if kind == "mistral" else {}),
    }
    return family(**{**settings, **changes})


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter drawn, biases and norms too, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.2 * drawn if "norm" in name and name.endswith("weight") else 0.25 * drawn)
    model.eval()


def write_text_model(directory: Path, config: Any, seed: int = 0, **saving: Any) -> Any:
    """Write a causal LM with tokenizer; returns transformers' model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    model.save_pretrained(directory, **saving)
    tokenizer().save_pretrained(directory)
    return model


def write_lvlm(
    directory: Path,
    *,
    kind: str = "llava",
    tower: str = "clip",
    seed: int = 0,
    text: Any = None,
    **settings: Any,
) -> Any:
    """Write a LLaVA-1.5 or LLaVA-NeXT checkpoint with tokenizer and image processor; returns transformers' model."""
    vision = (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=SIDE // 3,
    )
    tokens = tokenizer()
    common = {
        "vision_config": vision,
        "text_config": text or text_config(),
        "image_token_id": tokens.convert_tokens_to_ids("<image>"),
        "tie_word_embeddings": False,
        **settings,
    }
    size = {"height": SIDE, "width": SIDE}
    if kind == "llava":
        model: Any = LlavaForConditionalGeneration(LlavaConfig(**common))
        processor: Any = (
            CLIPImageProcessorPil(size=size, crop_size=size) if tower == "clip" else SiglipImageProcessorPil(size=size)
        )
    else:
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **common))
        processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=PINPOINTS
        )
    randomise(model, seed)
    model.save_pretrained(directory)
    tokens.chat_template = LVLM_CHAT_TEMPLATE
    tokens.save_pretrained(directory)
    processor.save_pretrained(directory)
    return model


def random_image(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_tokens(rng: np.random.Generator, length: int) -> np.ndarray:
    """Ordinary tokens: no special one and no image."""
    return rng.integers(10, 256, length)


def text_logits(model: Any, sequences: Sequence[np.ndarray]) -> list[Tensor]:
    """Our logits [n, V] of each sequence, packed into one forest."""
    forest = Forest.of([Tree((Segment(tokens),)) for tokens in sequences])
    with torch.no_grad():
        logits = model(forest) @ model.decoder.head_weight.T
    return list(logits.split([len(tokens) for tokens in sequences]))


def lvlm_logits(model: Any, question: str, images: Sequence[Image.Image], response: np.ndarray) -> Tensor:
    """Our logits [n, V] over a prompt with images and a response."""
    tokens = np.concatenate([model.encode_prompt(question, images), response])
    keys = tuple(f"image-{number}" for number in range(len(images)))
    forest = Forest.of([Tree((Segment(tokens),), keys)])
    features = dict(zip(keys, model.encode_images(images), strict=True)) if images else {}
    with torch.no_grad():
        return model(forest, features) @ model.decoder.head_weight.T


def oracle_logits(theirs: Any, ours: Any, question: str, images: Sequence[Image.Image], response: np.ndarray) -> Tensor:
    """transformers' own forward pass on the same tokens and its own processor's pixels."""
    tokens = np.concatenate([ours.encode_prompt(question, images), response])
    inputs = ours.vision.processor(images=list(images), return_tensors="pt") if images else {}
    with torch.no_grad():
        return theirs(input_ids=torch.from_numpy(tokens)[None], **inputs).logits[0]


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """fp32 sums in another order over a few layers: 1e-4 of the largest logit leaves an order of magnitude of room."""
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance * scale)


def reload(directory: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' model of a directory, and what its loader says of keys."""
    return AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
