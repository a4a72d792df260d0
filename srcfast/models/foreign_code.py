"""Refuse what a checkpoint's files could make transformers fetch from a hub, or import and run.

srcfast passes `trust_remote_code=False` everywhere, which keeps `auto_map` from being followed. What is below works without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
EXPERTS = ("eager", "batched_mm", "grouped_mm")


def _is_one_of(names: tuple[str, ...]) -> Callable[[Any], bool]:
    """Return whether a value, or each section's of it, is one of these names or none."""

    def fits(value: Any) -> bool:
        return all(one is None or one in names for one in (value.values() if isinstance(value, dict) else [value]))

    return fits


def _is_local_name(value: Any) -> bool:
    return not isinstance(value, str) or not {*"/:"} & {*value}


def _is_class_of(*parts: str) -> Callable[[Any], bool]:
    """Return whether a value names a class of one of these kinds, or none; transformers would call `from_pretrained` of any."""
    foreign = ("OneFormer", "Pix2Struct", "Auto")

    def fits(value: Any) -> bool:
        is_name = str(value).isidentifier() and not str(value).startswith(foreign)
        return value is None or (is_name and any(part in value for part in parts))

    return fits


# What has to be off, and why.
_OFF = {
    "use_kernels kernel_config": "kernels are fetched from a hub",
    "use_pretrained_backbone pretrained": "weights are fetched from a hub",
    "custom_generate": "it is code of a hub",
    "custom_pipelines": "they are code",
    "repo_path": "its files are fetched from a hub",
    "audio_tokenizer": "it is fetched from a hub",
    "checkpoint_path": "timm unpickles it",
}
_ATTENTION = _is_one_of(ATTENTION), f"one of {', '.join(ATTENTION)}: others are repositories of kernels"
_IMAGES = _is_class_of("ImageProcessor"), "an image processor's class, and one that fetches nothing"
# By fields, at any depth of a config: the values that reach nothing outside of the directory and of transformers.
_BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "_attn_implementation attn_implementation _attn_implementation_internal": _ATTENTION,
    "_experts_implementation experts_implementation": (
        _is_one_of(EXPERTS),
        f"one of {', '.join(EXPERTS)}: others are fetched",
    ),
    **{names: (lambda value: not value, f"none, or false: {why}") for names, why in _OFF.items()},
    "backbone architecture": (_is_local_name, "a name of timm, none of a hub"),
    "image_processor_type": _IMAGES,
    "feature_extractor_type": (_is_class_of("FeatureExtractor", "ImageProcessor"), "a feature extractor's class"),
    "tokenizer_class": (_is_class_of("Tokenizer", "Backend"), "a tokenizer's class"),
    "processor_class": (_is_class_of("Processor"), "a processor's class"),
    "vocab_file merges_file tokenizer_file spm_file": (_is_local_name, "a name in this directory"),
}
BOUNDS = {name: bound for names, bound in _BOUNDS.items() for name in names.split()}
FOREIGN_FILES = ("audio_tokenizer_config.json",)  # which names a model that is fetched
