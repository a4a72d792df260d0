"""Refuse what a checkpoint's files could make transformers fetch from a hub, or import and run.

srcfast passes `trust_remote_code=False` everywhere, which keeps `auto_map` from being followed. What is below works without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
EXPERTS = ("eager", "batched_mm", "grouped_mm")


def _is_off(value: Any) -> bool:
    return not value


def _is_one_of(names: tuple[str, ...]) -> Callable[[Any], bool]:
    """Return whether a value, or each section's of it, is one of these names or none."""

    def fits(value: Any) -> bool:
        return all(one is None or one in names for one in (value.values() if isinstance(value, dict) else [value]))

    return fits


def _is_local_name(value: Any) -> bool:
    return not isinstance(value, str) or not {*"/:"} & {*value}


def _is_class_of(*parts: str) -> Callable[[Any], bool]:
    """Return whether a value names a class of one of these kinds, or none; transformers would call `from_pretrained` of any."""
    return lambda value: (
        value is None
        or (
            str(value).isidentifier()
            and any(part in value for part in parts)
            and not value.startswith(("OneFormer", "Pix2Struct", "Auto"))
        )
    )


# By field, at any depth of a config: the values that reach nothing outside of the directory and of transformers.
BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("_attn_implementation", "attn_implementation"),
        (_is_one_of(ATTENTION), f"one of {', '.join(ATTENTION)}: others are repositories of kernels"),
    ),
    "_attn_implementation_internal": (_is_one_of(ATTENTION), f"one of {', '.join(ATTENTION)}"),
    **dict.fromkeys(
        ("_experts_implementation", "experts_implementation"),
        (_is_one_of(EXPERTS), f"one of {', '.join(EXPERTS)}: others are fetched"),
    ),
    "use_kernels": (_is_off, "false: kernels are fetched from a hub"),
    "kernel_config": (_is_off, "none: kernels are fetched from a hub"),
    "use_pretrained_backbone": (_is_off, "false: weights are fetched from a hub"),
    **dict.fromkeys(("backbone", "architecture"), (_is_local_name, "a name of timm, none of a hub")),
    "custom_generate": (_is_off, "none: it is code of a hub"),
    "custom_pipelines": (_is_off, "none: they are code"),
    "image_processor_type": (
        _is_class_of("ImageProcessor"),
        "an image processor's class, and one that fetches nothing",
    ),
    "feature_extractor_type": (_is_class_of("FeatureExtractor", "ImageProcessor"), "a feature extractor's class"),
    "tokenizer_class": (_is_class_of("Tokenizer", "Backend"), "a tokenizer's class"),
    "processor_class": (_is_class_of("Processor"), "a processor's class"),
    "repo_path": (_is_off, "none: its files are fetched from a hub"),
    "audio_tokenizer": (_is_off, "none: it is fetched from a hub"),
    "checkpoint_path": (_is_off, "none: timm unpickles it"),
    "pretrained": (_is_off, "false: weights are fetched from a hub"),
    **dict.fromkeys(
        ("vocab_file", "merges_file", "tokenizer_file", "spm_file"), (_is_local_name, "a name in this directory")
    ),
}
FOREIGN_FILES = ("audio_tokenizer_config.json",)  # which names a model that is fetched
