"""Small random checkpoints of Gemma's families: windows, soft caps, two-way images and prompts, heads of two sizes."""

from __future__ import annotations

from typing import Any

import transformers as tf

from helpers.family_parts import SQUARE, TEXT, Family

WINDOW = 24  # shorter than most prompts with an image


def layers_of(window: int = WINDOW) -> dict[str, Any]:
    """Settings of a text config: three layers with a window, one without."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return {"sliding_window": window, "layer_types": kinds}


def gemma3(**settings: Any) -> Family:
    text = {**TEXT, "head_dim": 16, "query_pre_attn_scalar": 24, **layers_of(), **settings}
    tokens = {"<image_soft_token>": 10, "<start_of_image>": 12, "<end_of_image>": 13}
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    config = tf.Gemma3Config(
        text_config=text,
        vision_config=SQUARE,
        mm_tokens_per_image=16,
        image_token_index=10,
        boi_token_index=12,
        eoi_token_index=13,
    )
    return Family(
        tf.Gemma3ForConditionalGeneration(config),
        tf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokens,
        "<start_of_image>",
        processor={"image_seq_length": 16},
        named=names,
    )


def paligemma(text: str = "gemma", **settings: Any) -> Family:
    config = tf.PaliGemmaConfig(
        text_config={**TEXT, "model_type": text, "head_dim": 16, **settings},
        vision_config={**SQUARE, "projection_dim": 64, "vision_use_head": False},
        projection_dim=64,
        image_token_index=10,
    )
    images = tf.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 64
    return Family(
        tf.PaliGemmaForConditionalGeneration(config),
        images,
        {"<image>": 10, "<bos>": 3},
        "<image>",
        template="",  # real checkpoints have none
        named={"image_token": "<image>", "bos_token": "<bos>"},
    )


def gemma4(*, two_way: bool) -> Family:
    text = {
        **TEXT,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "attention_k_eq_v": two_way,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0 if two_way else 8,
        "vocab_size_per_layer_input": TEXT["vocab_size"],
        "num_kv_shared_layers": 0 if two_way else 2,
        "use_bidirectional_attention": "vision" if two_way else None,
        "final_logit_softcapping": 8.0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "pooling_kernel_size": 3,
        "position_embedding_size": 1024,
    }
    config = tf.Gemma4Config(text_config=text, vision_config=vision, image_token_id=10, video_token_id=11)
    names = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    tokens = {"<|image|>": 10, "<|video|>": 11, **{name: 12 + i for i, name in enumerate([*names.values()][1:])}}
    return Family(
        tf.Gemma4ForConditionalGeneration(config),
        tf.Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=3),
        tokens,
        "<|image|>",
        named=names,
    )
