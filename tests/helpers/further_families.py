"""Small checkpoints of further families, as `helpers.families` has them; those that need torchvision among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as tf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from helpers.family_parts import DYNAMIC, SQUARE, TEXT, TOWER, VOCABULARY, Family, of_its_module

SIDES = {"height": 32, "width": 32}
SIGLIP = {**SQUARE, "model_type": "siglip_vision_model", "vision_use_head": False}
LLAMA = {**TEXT, "model_type": "llama"}
VQ = {  # of models that also draw images; unused here but for Chameleon
    "embed_dim": 8,
    "num_embeddings": 40,
    "latent_channels": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}


def janus() -> Family:
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4}
    config = tf.JanusConfig(
        text_config=LLAMA,
        vision_config={**tower, "projection_dim": 64, "num_image_tokens": 64, "mlp_ratio": 2.0},
        vq_config={**VQ, "num_patches": 8, "projection_dim": 64, "image_token_embed_dim": 64},
        image_token_id=10,
    )
    names = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    return Family(
        tf.JanusForConditionalGeneration(config),
        tf.JanusImageProcessorPil(size=SIDES, min_size=4),
        {name: 10 + number for number, name in enumerate(names.values())},
        "<image_placeholder>",
        processor={"num_image_tokens": 64},
        named=names,
    )


def aria() -> Family:
    config = tf.AriaConfig(
        text_config=tf.AriaTextConfig(**TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        vision_config={**TOWER, "model_type": "idefics3_vision", "image_size": 980, "patch_size": 140},
        projector_patch_to_query_dict={49: 16},
        image_token_index=10,
    )
    images = tf.AriaImageProcessorPil()
    return Family(
        tf.AriaForConditionalGeneration(config),
        images,
        {"<image>": 10},
        "<image>",
        processor={"size_conversion": {"980": 16}},
        named={"image_token": "<image>"},
    )


def ovis2() -> Family:
    config = tf.Ovis2Config(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**SQUARE, "vocab_size": 40, "hidden_stride": 2},
        image_token_id=10,
        visual_indicator_token_ids=[11, 12, 13, 14, 15],
        vocab_size=VOCABULARY,
        hidden_size=64,
    )
    names = ("<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>", "<image>")
    return Family(
        tf.Ovis2ForConditionalGeneration(config),
        of_its_module(tf.Ovis2ImageProcessorPil)(size=SIDES, crop_to_patches=True, max_patches=4),
        {name: 10 + number for number, name in enumerate(names)},
        "<image>",
        processor={"image_seq_length": 16},
    )


def hunyuan_vl() -> Family:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]}
    tower = {**TOWER, "patch_size": 4, "text_hidden_size": 64, "out_hidden_size": 64, "max_image_size": 64}
    config = tf.HunYuanVLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope},
        vision_config=tower,
        image_token_id=10,
        im_start_id=11,
        im_end_id=12,
        im_newline_id=13,
    )
    names = {"image_token": "<image>", "image_start_token": "<im_start>", "image_end_token": "<im_end>"}
    return Family(
        tf.HunYuanVLForConditionalGeneration(config),
        of_its_module(tf.HunYuanVLImageProcessorPil)(
            patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 64}
        ),
        {name: 10 + number for number, name in enumerate(names.values())},
        "<im_start><image><im_end>",
        named=names,
    )


def hyperclovax_vision_v2() -> Family:
    config = tf.HyperCLOVAXVisionV2Config(
        text_config={**TEXT, "model_type": "hyperclovax"},
        vision_config={
            **DYNAMIC,
            "model_type": "qwen2_5_vl_vision",
            "depth": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=10,
        video_token_id=11,
    )
    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 64}
    images = tf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    tokens = {"<|image_pad|>": 10, "<|video_pad|>": 11}
    return Family(tf.HyperCLOVAXVisionV2ForConditionalGeneration(config), images, tokens, "<|image_pad|>")


QWEN_IDS = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 12, "vision_end_token_id": 13}
QWEN_NAMES = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
PATCHES = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 64}}


def _with_qwen_s_tokens(model: Any, images: Any, names: tuple[str, ...] = QWEN_NAMES) -> Family:
    tokens = {name: 10 + number for number, name in enumerate(names)}
    return Family(model, images, tokens, f"{names[2]}{names[0]}{names[3]}")


def qwen3_5_moe() -> Family:
    text = {
        **TEXT,
        "head_dim": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
        },
    }
    tower = {**DYNAMIC, "depth": 2, "num_position_embeddings": 64}
    config = tf.Qwen3_5MoeConfig(text_config=text, vision_config=tower, **QWEN_IDS)
    images = tf.Qwen2VLImageProcessorPil(temporal_patch_size=2, **PATCHES)
    return _with_qwen_s_tokens(tf.Qwen3_5MoeForConditionalGeneration(config), images)


def cohere_compass() -> Family:
    config = tf.CohereCompassConfig(
        text_config={
            **TEXT,
            "layer_types": ["full_attention"] * 4,
            "sliding_window": 1024,
            "logit_scale": 0.5,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
            },
        },
        vision_config={**DYNAMIC, "depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        **QWEN_IDS,
    )
    images = tf.CohereCompassImageProcessorPil(temporal_patch_size=2, **PATCHES)
    names = ("<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>")
    return _with_qwen_s_tokens(tf.CohereCompassForConditionalGeneration(config), images, names)


def glmga() -> Family:
    """GLM-4.6V's model with other images; transformers has no processor of this name."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    marks = {"image_start_token_id": 12, "image_end_token_id": 13, "video_start_token_id": 14, "video_end_token_id": 15}
    config = tf.GlmgaConfig(
        text_config={**TEXT, "model_type": "glm4v_text", "rope_parameters": rope},
        vision_config={**DYNAMIC, "model_type": "glm4v_vision", "depth": 2, "image_size": 32},
        image_token_id=10,
        video_token_id=11,
        **marks,
    )
    names = ("image", "video", "begin_of_image", "end_of_image", "begin_of_video", "end_of_video")
    return Family(
        tf.Glm46VForConditionalGeneration(config),
        tf.GlmgaImageProcessorPil(temporal_patch_size=2, **PATCHES),
        {f"<|{name}|>": 10 + number for number, name in enumerate(names)},
        "<|begin_of_image|><|image|><|end_of_image|>",
        processor={"processor_class": "Glm46VProcessor"},
    )


def lfm3_vl() -> Family:
    config = tf.Lfm3VlConfig(
        text_config={**TEXT, "model_type": "lfm3", "layer_types": ["conv", "full_attention"] * 2},
        vision_config={**TOWER, "patch_size": 4, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
        projector_hidden_size=48,
        **QWEN_IDS,
    )
    images = tf.Qwen2VLImageProcessorPil(temporal_patch_size=2, **PATCHES)
    return _with_qwen_s_tokens(tf.Lfm3VlForConditionalGeneration(config), images)


def granite_docling() -> Family:
    text = {**TEXT, "attention_multiplier": 0.2, "embedding_multiplier": 2.0, "residual_multiplier": 0.6}
    config = tf.GraniteDoclingConfig(
        text_config={**text, "logits_scaling": 2.0},
        vision_config={
            **SQUARE,
            "scale_factor": 2,
            "out_hidden_size": 64,
            "use_fine_route": False,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=10,
    )
    tokens = {"<image>": 10, "<fake_token_around_image>": 11, "<global-img>": 12}
    tokens |= {f"<row_{row}_col_{column}>": 10 + 4 * row + column for row in range(1, 5) for column in range(1, 5)}
    return Family(
        tf.GraniteDoclingForConditionalGeneration(config),
        tf.GraniteDoclingImageProcessorPil(size=SIDES, max_patches=4),
        tokens,
        "<image>",
        processor={"image_seq_len": 16},
    )


# Those whose image processor or processor needs torchvision.


def mistral3() -> Family:
    config = tf.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
        vision_config={**TOWER, "model_type": "pixtral", "image_size": 64, "patch_size": 4, "head_dim": 16},
        image_token_index=10,
    )
    return Family(
        tf.Mistral3ForConditionalGeneration(config),
        tf.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 4, "width": 4}),
        {"[IMG]": 10, "[IMG_BREAK]": 11, "[IMG_END]": 12},
        "[IMG]",
        processor={"patch_size": 4, "spatial_merge_size": 2},
    )


def lfm2_vl() -> Family:
    config = tf.Lfm2VlConfig(
        text_config={**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2},
        vision_config={**TOWER, "model_type": "siglip2_vision_model", "num_patches": 64, "patch_size": 4},
        image_token_id=10,
        projector_hidden_size=48,
    )
    names = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }
    images = tf.Lfm2VlImageProcessor(
        tile_size=32, encoder_patch_size=4, min_image_tokens=4, max_image_tokens=16, max_tiles=4, size=SIDES
    )
    tokens = [*names.values(), *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))]
    return Family(
        tf.Lfm2VlForConditionalGeneration(config),
        images,
        {name: 10 + number for number, name in enumerate(tokens)},
        "<image>",
        named=names,
    )


def cohere2_vision() -> Family:
    config = tf.Cohere2VisionConfig(
        text_config={**TEXT, "model_type": "cohere2", "head_dim": 16, "sliding_window": 1024},
        vision_config=SIGLIP,
        image_token_id=10,
        downsample_factor=2,
        alignment_intermediate_size=96,
    )
    names = {
        "image_token": "<|IMG_PATCH|>",
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    return Family(
        tf.Cohere2VisionForConditionalGeneration(config),
        tf.Cohere2VisionImageProcessor(size=SIDES, patch_size=4, max_patches=4),
        {name: 10 + number for number, name in enumerate(names.values())},
        "<|IMG_PATCH|>",
        named=names,
    )


# Those that are refused.


def chameleon() -> Family:
    codes = {f"IMGIMG{letter}{'Z'}": 20 + number for number, letter in enumerate("ABCDEFGH" * 5)}
    config = tf.ChameleonConfig(
        **TEXT,
        vq_config={**VQ, "resolution": 32},
        vocabulary_map={"<image>": 10, **codes},
    )
    return Family(
        tf.ChameleonForConditionalGeneration(config),
        tf.ChameleonImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDES),
        {"<image>": 10, "<racm3:break>": 11, "<eoss>": 12},
        "<image>",
        processor={"image_seq_length": 256},
    )


def got_ocr2() -> Family:
    tower = {**TOWER, "output_channels": 16, "image_size": 64, "patch_size": 4, "window_size": 4, "mlp_dim": 48}
    config = tf.GotOcr2Config(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**tower, "global_attn_indexes": [0, 1]},
        image_token_index=10,
        image_seq_length=16,
    )
    return Family(
        tf.GotOcr2ForConditionalGeneration(config),
        tf.GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}),
        {"<imgpad>": 10, "<img>": 11, "</img>": 12},
        "<img><imgpad></img>",
    )


def granite4_vision() -> Family:
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    config = tf.Granite4VisionConfig(
        text_config={**TEXT, "attention_multiplier": 0.2, "embedding_multiplier": 2.0, "residual_multiplier": 0.6},
        vision_config={**SIGLIP, "hidden_size": 64},  # one head a 64 in its Q-Former
        image_token_index=10,
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_target_layers=[2, 3],
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
        },
    )
    return Family(
        tf.Granite4VisionForConditionalGeneration(config),
        tf.LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDES, image_grid_pinpoints=pinpoints),
        {"<image>": 10},
        "<image>\n",
        processor={"patch_size": 4, "vision_feature_select_strategy": "full", "downsample_rate": "1/2"},
    )


VERSION = tuple(map(int, tf.__version__.split(".")[:2]))
# Gemma 4's processor imports torchvision in 5.17 and 5.18, in 5.21 no more.
NO_GEMMA4 = VERSION < (5, 21) and not is_torchvision_available()
HAS_HUNYUAN = VERSION >= (5, 18)  # the check at loading refuses it before
# By model type, so that a version of transformers without a type leaves it out.
FURTHER: dict[str, Callable[[], Family]] = {
    family.__name__: family
    for family in (
        janus,
        aria,
        ovis2,
        hunyuan_vl,
        hyperclovax_vision_v2,
        qwen3_5_moe,
        cohere_compass,
        glmga,
        lfm3_vl,
        granite_docling,
    )
    if family.__name__ in CONFIG_MAPPING_NAMES and (family is not hunyuan_vl or HAS_HUNYUAN)
}
WITH_TORCHVISION: dict[str, Callable[[], Family]] = {
    "mistral3": mistral3,
    "lfm2_vl": lfm2_vl,
    "cohere2_vision": cohere2_vision,
}
FURTHER_REFUSED: dict[str, tuple[Callable[[], Family], str]] = {
    "chameleon": (chameleon, "vision_config"),
    "got_ocr2": (got_ocr2, "Nested images are only supported"),
    "granite4_vision": (granite4_vision, "granite4_vision: "),
}

TIMM = "its tower is one of timm, which is not installed"
VIDEOS = "its processor asks for that of videos, which needs torchvision and is left out: refused when it is loaded"
NO_PROCESSOR = "transformers has no processor of this name: it runs where the checkpoint names one"
NOT_MADE = "no small checkpoint of it has been made"
# Model types that are neither among the families nor refused by their config, and why.
UNTESTED = {
    "fast_vlm": TIMM,
    "perception_lm": TIMM,
    "minicpmv4_6": VIDEOS,
    "minicpmv4_7": VIDEOS,
    "cosmos3_omni": NO_PROCESSOR,
    "qwen2_5_omni_thinker": NO_PROCESSOR,
    "qwen3_omni_moe_thinker": NO_PROCESSOR,
    "cosmos3_edge": "its processor states no token types, without which transformers' ordinary pass fails",
    "pp_chart2table": "GOT-OCR 2, which is refused, under another name",
    "apertus1p5": NOT_MADE,
    "deepseek_ocr2": NOT_MADE,
    "emu3": NOT_MADE,
    "fuyu": NOT_MADE,
    "minicpm_ocr": NOT_MADE,
    "minimax_m3_vl": NOT_MADE,
    "molmo2": NOT_MADE,
    "step3p7": NOT_MADE,
    "gemma3n": TIMM,
    "gemma4_unified": NOT_MADE,
    "shieldgemma2": NOT_MADE,
    "diffusion_gemma": NOT_MADE,
    "muse_glimmer": NOT_MADE,
    "muse_spark": NOT_MADE,
    **({"gemma4": "its processor needs torchvision in this version of transformers"} if NO_GEMMA4 else {}),
    **({} if HAS_HUNYUAN else {"hunyuan_vl": "refused when it is loaded, by this version of transformers"}),
}
