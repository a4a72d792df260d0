"""Small random checkpoints of transformers' LVLM families, each with its own processor, chat template and image sizes.

Each family is one function; `write_family` saves what it returns as transformers does. Image processors are those that need
Pillow and numpy alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers.utils import is_torchvision_available

from helpers.family_parts import (
    CHAT,
    DYNAMIC,
    SQUARE,
    SYSTEM,
    TEXT,
    TOWER,
    USER_ASSISTANT,
    VICUNA,
    Family,
    byte_tokenizer,
    of_its_module,
    randomise,
)
from helpers.further_families import FURTHER, FURTHER_REFUSED, NO_GEMMA4, WITH_TORCHVISION
from helpers.gemma_families import gemma3, gemma4, layers_of, paligemma


def write_family(name: str, directory: Path, seed: int = 1, likes: Sequence[str] = ()) -> Any:
    """Write the checkpoint; returns transformers' model. The head's rows of the tokens `likes` are large."""
    family = FAMILIES[name]() if name in FAMILIES else REFUSED[name][0]()
    template = family.template.replace("%IMAGE%", family.image)
    randomise(family.model, seed)
    tokenizer = byte_tokenizer(family)
    with torch.no_grad():
        family.model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(list(likes))] *= 4.0
    family.model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    family.image_processor.save_pretrained(directory)
    if template:
        (directory / "chat_template.jinja").write_text(template)
    if family.processor:
        (directory / "processor_config.json").write_text(json.dumps(family.processor))
    return family.model


def _rope(*sections: int, **settings: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **settings}


QWEN_IDS = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 12, "vision_end_token_id": 13}
QWEN_TOKENS = {"<|image_pad|>": 10, "<|video_pad|>": 11, "<|vision_start|>": 12, "<|vision_end|>": 13}


def _qwen(model: Any) -> Family:
    processor = tf.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 64}
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return Family(model, processor, QWEN_TOKENS, image, SYSTEM + CHAT)


def qwen2_vl() -> Family:
    config = tf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": _rope(2, 3, 3)},
        vision_config={**DYNAMIC, "depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        **QWEN_IDS,
    )
    return _qwen(tf.Qwen2VLForConditionalGeneration(config))


def qwen2_5_vl() -> Family:
    config = tf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": _rope(2, 3, 3)},
        vision_config={**DYNAMIC, "depth": 2, "window_size": 16, "fullatt_block_indexes": [1]},
        **QWEN_IDS,
    )
    return _qwen(tf.Qwen2_5_VLForConditionalGeneration(config))


QWEN3_TEXT = {**TEXT, "head_dim": 16, "rope_parameters": _rope(4, 2, 2, mrope_interleaved=True)}
QWEN3_TOWER = {**DYNAMIC, "depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}


def qwen3_vl() -> Family:
    config = tf.Qwen3VLConfig(text_config=QWEN3_TEXT, vision_config=QWEN3_TOWER, **QWEN_IDS)
    return _qwen(tf.Qwen3VLForConditionalGeneration(config))


def qwen3_vl_moe() -> Family:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = tf.Qwen3VLMoeConfig(text_config={**QWEN3_TEXT, **experts}, vision_config=QWEN3_TOWER, **QWEN_IDS)
    return _qwen(tf.Qwen3VLMoeForConditionalGeneration(config))


def qwen3_5() -> Family:
    linear = {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "rope_parameters": _rope(2, 1, 1, partial_rotary_factor=0.25, mrope_interleaved=True),
    }
    tower = {name: value for name, value in QWEN3_TOWER.items() if name != "deepstack_visual_indexes"}
    config = tf.Qwen3_5Config(text_config={**TEXT, "head_dim": 32, **linear}, vision_config=tower, **QWEN_IDS)
    return _qwen(tf.Qwen3_5ForConditionalGeneration(config))


def video_llama_3() -> Family:
    config = tf.VideoLlama3Config(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**TOWER, "model_type": "video_llama_3_vision", "patch_size": 4},
        image_token_id=10,
        video_token_id=11,
    )
    processor = tf.VideoLlama3ImageProcessorPil(patch_size=4, merge_size=2, min_pixels=16 * 16, max_pixels=32 * 64)
    return Family(tf.VideoLlama3ForConditionalGeneration(config), processor, QWEN_TOKENS, "<|image_pad|>")


GLM_TOKENS = {
    "<|image|>": 10,
    "<|video|>": 11,
    "<|begin_of_image|>": 12,
    "<|end_of_image|>": 13,
    "<|begin_of_video|>": 14,
    "<|end_of_video|>": 15,
}
GLM_IDS = {
    "image_token_id": 10,
    "video_token_id": 11,
    "image_start_token_id": 12,
    "image_end_token_id": 13,
    "video_start_token_id": 14,
    "video_end_token_id": 15,
}


def _glm(model: Any, processor: Any = tf.Glm4vImageProcessorPil) -> Family:
    size = {"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 32 * 64}
    images = processor(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    return Family(model, images, GLM_TOKENS, "<|begin_of_image|><|image|><|end_of_image|>")


GLM_TEXT = {**TEXT, "rope_parameters": _rope(2, 1, 1, partial_rotary_factor=0.5)}
GLM_TOWER = {**DYNAMIC, "depth": 2, "image_size": 32}


def glm4v() -> Family:
    config = tf.Glm4vConfig(text_config=GLM_TEXT, vision_config=GLM_TOWER, **GLM_IDS)
    return _glm(tf.Glm4vForConditionalGeneration(config))


def glm46v() -> Family:
    config = tf.Glm46VConfig(
        text_config={**GLM_TEXT, "model_type": "glm4v_text"},
        vision_config={**GLM_TOWER, "model_type": "glm4v_vision"},
        **GLM_IDS,
    )
    return _glm(tf.Glm46VForConditionalGeneration(config), tf.Glm46VImageProcessorPil)


def glm_ocr() -> Family:
    """A type for which transformers has no processor: the checkpoint's file names it."""
    text = {**TEXT, "head_dim": 16, "rope_parameters": _rope(4, 2, 2)}
    family = _glm(
        tf.GlmOcrForConditionalGeneration(tf.GlmOcrConfig(text_config=text, vision_config=GLM_TOWER, **GLM_IDS)),
        tf.Glm46VImageProcessorPil,
    )
    return replace(family, processor={"processor_class": "Glm46VProcessor"})


INTERNVL_TOKENS = {"<IMG_CONTEXT>": 10, "<video>": 11, "<img>": 12, "</img>": 13}
INTERNVL_NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def tiled_images(crop: bool = True) -> Any:
    """Up to four tiles and a thumbnail."""
    return tf.GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, max_patches=4, min_patches=1, crop_to_patches=crop
    )


def internvl(text: str = "qwen3") -> Family:
    more = {"head_dim": 16} if text == "qwen3" else {}
    config = tf.InternVLConfig(
        text_config={**TEXT, "model_type": text, **more},
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [4, 4]},
        image_token_id=10,
        downsample_ratio=0.5,
        image_seq_length=16,
    )
    return Family(
        tf.InternVLForConditionalGeneration(config),
        tiled_images(crop=False),  # as published: the processor sets it
        INTERNVL_TOKENS,
        "<IMG_CONTEXT>\n",
        processor={"image_seq_length": 16, "processor_class": "InternVLProcessor"},
        named=INTERNVL_NAMED,
    )


def _rows_and_columns(model: Any, images: Any) -> Family:
    tokens = {"<image>": 10, "<fake_token_around_image>": 11, "<global-img>": 12, "<end_of_utterance>": 13}
    tokens |= {f"<row_{row}_col_{column}>": 10 + 4 * row + column for row in range(1, 5) for column in range(1, 5)}
    return Family(model, images, tokens, "<image>", USER_ASSISTANT, {"image_seq_len": 16}, first="<|im_start|>")


def smolvlm() -> Family:
    text = {**TEXT, "model_type": "llama"}
    config = tf.SmolVLMConfig(text_config=text, vision_config=SQUARE, image_token_id=10, scale_factor=2)
    images = of_its_module(tf.SmolVLMImageProcessorPil)(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return _rows_and_columns(tf.SmolVLMForConditionalGeneration(config), images)


def idefics3() -> Family:
    text = {**TEXT, "model_type": "llama"}
    config = tf.Idefics3Config(text_config=text, vision_config=SQUARE, image_token_id=10, scale_factor=2)
    images = of_its_module(tf.Idefics3ImageProcessorPil)(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return _rows_and_columns(tf.Idefics3ForConditionalGeneration(config), images)


CLIP = {**SQUARE, "model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = {**SQUARE, "model_type": "siglip_vision_model", "vision_use_head": False}
SIDES = {"height": 32, "width": 32}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
TEXTS_OF_LLAVA: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}


def llava(text: str = "llama") -> Family:
    config = tf.LlavaConfig(
        text_config={**TEXT, "model_type": text, **TEXTS_OF_LLAVA[text]}, vision_config=CLIP, image_token_index=10
    )
    family = _llava(tf.LlavaForConditionalGeneration(config))
    return (
        replace(family, template=VICUNA, tokens={"<image>": 10, "<s>": 3}, first="<s>") if text == "llama" else family
    )


def vipllava() -> Family:
    config = tf.VipLlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**CLIP, "num_hidden_layers": 4},
        vision_feature_layers=[-2, -3],
        image_token_index=10,
    )
    return _llava(tf.VipLlavaForConditionalGeneration(config))


def _llava(model: Any) -> Family:
    images = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDES)
    settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return Family(model, images, {"<image>": 10}, "<image>\n", processor=settings)


def llava_next() -> Family:
    config = tf.LlavaNextConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=CLIP,
        image_token_index=10,
        image_grid_pinpoints=PINPOINTS,
    )
    images = tf.LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDES, image_grid_pinpoints=PINPOINTS)
    settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return Family(
        tf.LlavaNextForConditionalGeneration(config), images, {"<image>": 10}, "<image>\n", processor=settings
    )


def llava_onevision() -> Family:
    config = tf.LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config=SIGLIP,
        image_token_index=10,
        video_token_index=11,
        image_grid_pinpoints=[[32, 32], *PINPOINTS],
    )
    images = tf.LlavaOnevisionImageProcessorPil(size=SIDES, image_grid_pinpoints=[[32, 32], *PINPOINTS])
    return Family(
        tf.LlavaOnevisionForConditionalGeneration(config),
        images,
        {"<image>": 10, "<video>": 11},
        "<image>\n",
        processor={"num_image_tokens": 64, "vision_feature_select_strategy": "full"},
    )


def llava_next_video() -> Family:
    config = tf.LlavaNextVideoConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=CLIP,
        image_token_index=10,
        video_token_index=11,
        image_grid_pinpoints=PINPOINTS,
    )
    still = llava_next()
    return replace(
        still, model=tf.LlavaNextVideoForConditionalGeneration(config), tokens={"<image>": 10, "<video>": 11}
    )


def video_llava() -> Family:
    config = tf.VideoLlavaConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config=CLIP, image_token_index=10, video_token_index=11
    )
    still = _llava(tf.VideoLlavaForConditionalGeneration(config))
    images = tf.VideoLlavaImageProcessor(size={"shortest_edge": 32}, crop_size=SIDES)
    return replace(still, image_processor=images, tokens={"<image>": 10, "<video>": 11})


def idefics2() -> Family:
    resampler = {
        "hidden_size": 64,
        "resampler_n_latents": 8,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 16,
        "num_key_value_heads": 2,
    }
    config = tf.Idefics2Config(
        text_config={**TEXT, "model_type": "mistral", **TEXTS_OF_LLAVA["mistral"]},
        vision_config={**SQUARE, "model_type": "idefics2_vision"},
        perceiver_config=resampler,
        image_token_id=10,
    )
    images = of_its_module(tf.Idefics2ImageProcessorPil)(
        size={"shortest_edge": 20, "longest_edge": 32}, do_image_splitting=True
    )
    tokens = {"<image>": 10, "<fake_token_around_image>": 11, "<end_of_utterance>": 13}
    model = tf.Idefics2ForConditionalGeneration(config)
    return Family(model, images, tokens, "<image>", USER_ASSISTANT, {"image_seq_len": 8})


def glm4v_moe() -> Family:
    experts = {
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }
    config = tf.Glm4vMoeConfig(text_config={**GLM_TEXT, **experts}, vision_config=GLM_TOWER, **GLM_IDS)
    return _glm(tf.Glm4vMoeForConditionalGeneration(config))


def exaone4_5() -> Family:
    text = {"model_type": "exaone4", "head_dim": 16, **layers_of(12)}
    tower = {**DYNAMIC, "depth": 2, "window_size": 16, "fullatt_block_indexes": [1], "num_key_value_heads": 2}
    config = tf.Exaone4_5_Config(
        text_config={**TEXT, **text}, vision_config=tower, image_token_id=10, video_token_id=11
    )
    return _qwen(tf.Exaone4_5_ForConditionalGeneration(config))


def lighton_ocr() -> Family:
    config = tf.LightOnOcrConfig(
        text_config={**TEXT, "model_type": "qwen3", "head_dim": 16},
        vision_config={**TOWER, "model_type": "pixtral", "image_size": 64, "patch_size": 4, "head_dim": 16},
        image_token_id=10,
    )
    return Family(
        tf.LightOnOcrForConditionalGeneration(config),
        tf.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}),
        {"<|image_pad|>": 10, "<|vision_pad|>": 11, "<|vision_end|>": 12},
        "<|image_pad|>",
        processor={"patch_size": 4, "spatial_merge_size": 2},
        named={
            "image_token": "<|image_pad|>",
            "image_break_token": "<|vision_pad|>",
            "image_end_token": "<|vision_end|>",
        },
    )


def paddleocr_vl() -> Family:
    config = tf.PaddleOCRVLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": _rope(2, 3, 3)},
        vision_config={**TOWER, "image_size": 32, "patch_size": 4},
        **QWEN_IDS,
    )
    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 64}
    tokens = {"<|IMAGE_PLACEHOLDER|>": 10, "<|video|>": 11, "<|IMAGE_START|>": 12, "<|IMAGE_END|>": 13}
    return Family(
        tf.PaddleOCRVLForConditionalGeneration(config),
        tf.PaddleOCRVLImageProcessorPil(patch_size=4, merge_size=2, size=size),
        tokens,
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        named={"image_token": "<|IMAGE_PLACEHOLDER|>"},
    )


def _deepseek(model: Any, images: Any) -> Family:
    token = "<image_placeholder>"
    return Family(model, images, {token: 10}, token, processor={"num_image_tokens": 64}, named={"image_token": token})


def deepseek_vl() -> Family:
    text = {**TEXT, "model_type": "llama"}
    config = tf.DeepseekVLConfig(text_config=text, vision_config=SIGLIP, image_token_id=10)
    return _deepseek(tf.DeepseekVLForConditionalGeneration(config), tf.DeepseekVLImageProcessorPil(size=SIDES))


def deepseek_vl_hybrid() -> Family:
    large = {**TOWER, "output_channels": 16, "image_size": 64, "patch_size": 4, "window_size": 4, "mlp_dim": 48}
    config = tf.DeepseekVLHybridConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=SIGLIP,
        image_token_id=10,
        high_res_vision_config={**large, "global_attn_indexes": [0, 1]},
    )
    images = tf.DeepseekVLHybridImageProcessorPil(size=SIDES, high_res_size={"height": 64, "width": 64})
    return _deepseek(tf.DeepseekVLHybridForConditionalGeneration(config), images)


def qianfan_ocr() -> Family:
    config = tf.QianfanOCRConfig(
        text_config={**TEXT, "model_type": "qwen3", "head_dim": 16},
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [4, 4]},
        image_token_id=10,
        downsample_ratio=0.5,
        image_seq_length=16,
    )
    return Family(
        tf.QianfanOCRForConditionalGeneration(config),
        tiled_images(),
        INTERNVL_TOKENS | {"<image>": 14},
        "<image>\n",
        processor={"image_seq_length": 16},
        named=INTERNVL_NAMED,
    )


def aya_vision() -> Family:
    text = {**TEXT, "model_type": "cohere2", "head_dim": 16, "sliding_window": 12}
    config = tf.AyaVisionConfig(text_config=text, vision_config=SIGLIP, image_token_index=10, downsample_factor=2)
    marks = ("<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "<image>")
    tiles = ("TILE_1", "TILE_2", "TILE_3", "TILE_4", "TILE_GLOBAL")
    return Family(
        tf.AyaVisionForConditionalGeneration(config),
        tiled_images(),
        {name: 10 + number for number, name in enumerate(marks + tiles)},
        "<image>",
        processor={"patch_size": 4, "img_size": 32, "downsample_factor": 2},
    )


# Those that are refused.


def llava_of(text: str, **settings: Any) -> Family:
    """A LLaVA with another language model."""
    config = tf.LlavaConfig(
        text_config={**TEXT, "model_type": text, **settings}, vision_config=CLIP, image_token_index=10
    )
    return _llava(tf.LlavaForConditionalGeneration(config))


def ernie4_5_vl_moe() -> Family:
    experts = {"moe_intermediate_size": [32, 24], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
    config = tf.Ernie4_5_VLMoeConfig(
        text_config={**TEXT, **experts, "rope_parameters": _rope(3, 3, 2)},
        vision_config={**DYNAMIC, "depth": 2, "temporal_merge_size": 2},
        **GLM_IDS,
    )
    names = {
        "image_token": "<|IMAGE_PLACEHOLDER|>",
        "video_token": "<|VIDEO|>",
        "image_start_token": "<|IMAGE_START|>",
        "image_end_token": "<|IMAGE_END|>",
        "video_start_token": "<|VIDEO_START|>",
        "video_end_token": "<|VIDEO_END|>",
    }
    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 64}
    return Family(
        tf.Ernie4_5_VLMoeForConditionalGeneration(config),
        tf.Ernie4_5_VLMoeImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=1, size=size),
        {name: 10 + number for number, name in enumerate(names.values())},
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        named=names,
    )


# Those that run on the general backbone.
FAMILIES: dict[str, Callable[[], Family]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "lfm2": partial(llava_of, "lfm2", layer_types=["conv", "full_attention"] * 2),
    "video_llama_3": video_llama_3,
    "glm4v": glm4v,
    "glm46v": glm46v,
    "glm4v_moe": glm4v_moe,
    "glm_ocr": glm_ocr,
    "internvl": internvl,
    "internvl_qwen2": partial(internvl, "qwen2"),
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    **{f"llava_{text}": partial(llava, text) for text in TEXTS_OF_LLAVA},
    "vipllava": vipllava,
    "llava_next": llava_next,
    "llava_next_video": llava_next_video,
    "llava_onevision": llava_onevision,
    "video_llava": video_llava,
    "idefics2": idefics2,
    "aya_vision": aya_vision,
    "exaone4_5": exaone4_5,
    "deepseek_vl": deepseek_vl,
    "deepseek_vl_hybrid": deepseek_vl_hybrid,
    "lighton_ocr": lighton_ocr,
    "paddleocr_vl": paddleocr_vl,
    "qianfan_ocr": qianfan_ocr,
    "gemma3": gemma3,
    "gemma3_capped": partial(gemma3, final_logit_softcapping=8.0, attn_logit_softcapping=2.0),
    **({} if NO_GEMMA4 else {"gemma4": partial(gemma4, two_way=False), "gemma4_vision": partial(gemma4, two_way=True)}),
    "paligemma": paligemma,
    "paligemma2": partial(paligemma, "gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=8.0, **layers_of()),
    "gemma2": partial(llava_of, "gemma2", head_dim=16, attn_logit_softcapping=2.0, **layers_of(12)),
    "llava_window": partial(llava_of, "mistral", sliding_window=12),
    "cohere2": partial(llava_of, "cohere2", **layers_of(12)),
    **FURTHER,
    **(WITH_TORCHVISION if is_torchvision_available() else {}),
}
SINKS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 1024}
# Those that it does not run, and what of them the error names.
REFUSED: dict[str, tuple[Callable[[], Family], str]] = {
    "sinks": (partial(llava_of, "gpt_oss", **SINKS), "logits that differ by"),
    "ernie4_5_vl_moe": (ernie4_5_vl_moe, "logits that differ by"),
    **FURTHER_REFUSED,
}
