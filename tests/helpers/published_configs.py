"""Directories with the config files of published LVLMs (tests/fixtures/configs) and a tokenizer of their special tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import transformers as tf
from tokenizers import Tokenizer, models

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
# Parameters of the checkpoints, as their pages state them; of Qwen3.5 what transformers builds of them, see README.md there.
PUBLISHED = {
    "LLaVA-1.5-7B": 7.06e9,
    "LLaVA-1.5-13B": 13.35e9,
    "Qwen2.5-VL-3B": 3.75e9,
    "Qwen2.5-VL-7B": 8.29e9,
    "Qwen3-VL-4B": 4.44e9,
    "Qwen3-VL-8B": 8.77e9,
    "Qwen3.5-0.8B": 0.853e9,
    "Qwen3.5-2B": 2.21e9,
    "Qwen3.5-4B": 4.54e9,
    "InternVL3-8B": 7.94e9,
    "SmolVLM2-2.2B": 2.25e9,
    "Gemma3-4B": 4.30e9,
    "Gemma3-12B": 12.19e9,
}
QWEN = {"<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|image_pad|>": 151655, "<|video_pad|>": 151656}
QWEN3_5 = {name: number + 96401 for name, number in QWEN.items()}
INTERNVL = {"<img>": 151665, "</img>": 151666, "<IMG_CONTEXT>": 151667, "<video>": 151670}
SMOLVLM = {"<global-img>": 49152, "<fake_token_around_image>": 49189, "<image>": 49190, "<end_of_utterance>": 49279}
GEMMA = {"<start_of_image>": 255999, "<end_of_image>": 256000, "<image_soft_token>": 262144}
# By the model type of config.json: special tokens, and the tokenizer's names of them.
TOKENS: dict[str, tuple[dict[str, int], dict[str, str]]] = {
    "qwen2_5_vl": (QWEN, {}),
    "qwen3_vl": (QWEN, {}),
    "qwen3_5": (QWEN3_5, {}),
    "internvl": (
        INTERNVL,
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "smolvlm": (
        SMOLVLM
        | {f"<row_{row}_col_{column}>": 49146 + 6 * row + column for row in range(1, 7) for column in range(1, 7)},
        {},
    ),
    "gemma3": (
        GEMMA,
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    ),
    "llava": ({"<image>": 32000}, {}),
}


def write_published(name: str, directory: Path) -> Path:
    """Write a directory of a published model's config files, without weights, and return it."""
    folder = directory / name
    shutil.copytree(CONFIGS / name, folder)
    tokens, named = TOKENS[tf.AutoConfig.from_pretrained(folder).model_type]
    vocabulary = {"<unk>": 0, "<pad>": 1, "</s>": 2} | tokens
    backend = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    backend.add_special_tokens([*vocabulary])
    options = {"extra_special_tokens": named} if named else {}
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", **options
    )
    tokenizer.save_pretrained(folder)
    return folder
