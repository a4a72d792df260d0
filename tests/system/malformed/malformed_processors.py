"""Settings of processors, tokenizers and configs that torch or transformers would take as they are: bounds, one change each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from malformed_case import Case
from malformed_checkpoints import ASSETS, CONFIG, lvlm, model, read_lvlm, read_model

PROCESSOR: dict[str, tuple[dict[str, Any], str]] = {
    "4 deviations": ({"image_std": [0.5] * 4}, "image_std"),
    "no deviation": ({"image_std": []}, "image_std"),
    "a deviation of 0": ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
    "a deviation below 0": ({"image_std": [-0.5] * 3}, "image_std"),
    "a deviation of 1e-30": ({"image_std": [1e-30] * 3}, "image_std"),
    "a deviation of NaN": ({"image_std": [float("nan")] * 3}, "finite"),
    "deviations in words": ({"image_std": ["a"] * 3}, "image_std"),
    "2 means": ({"image_mean": [0.5, 0.5]}, "image_mean"),
    "a mean of Infinity": ({"image_mean": [float("inf")] * 3}, "finite"),
    "a mean of 1e30": ({"image_mean": [1e30] * 3}, "image_mean"),
    "a mean of null": ({"image_mean": [None] * 3}, "image_mean"),
    "a factor of 0": ({"rescale_factor": 0}, "rescale_factor"),
    "a factor below 0": ({"rescale_factor": -1.0}, "rescale_factor"),
    "a factor of 1e30": ({"rescale_factor": 1e30}, "rescale_factor"),
    "a factor in words": ({"rescale_factor": "1/255"}, "rescale_factor"),
    "a filter that Pillow has not": ({"resample": 99}, "resample"),
    "a filter below 0": ({"resample": -1}, "resample"),
    "a filter in words": ({"resample": "bicubic"}, "resample"),
    "a size below 0": ({"size": {"height": -72, "width": 72}}, "size"),
    "a size of 0": ({"size": {"shortest_edge": 0}}, "size"),
    "a size of 20,000 x 20,000": ({"size": {"height": 20_000, "width": 20_000}}, "size"),
    "a shortest edge of 20,000": ({"size": {"shortest_edge": 20_000}}, "size"),
    "a size beyond all": ({"size": {"height": 10**12, "width": 10**12}}, "size"),
    "a size that merged patches would have": ({"size": {"shortest_edge": 20_000}, "merge_size": 2}, "size"),
    "a size in words": ({"size": "large"}, "size"),
    "a size with a point": ({"size": {"height": 72.5, "width": 72}}, "size"),
    "a crop below 0": ({"crop_size": {"height": -72, "width": -72}}, "crop_size"),
    "a crop of 20,000 x 20,000": ({"crop_size": {"height": 20_000, "width": 20_000}}, "crop_size"),
    "a crop that differs from the tower's images": ({"crop_size": {"height": 60, "width": 60}}, "images"),
    "a size by unknown sides": ({"size": {"depth": 72}}, "preprocessor_config.json"),
    "a crop that is a list": ({"crop_size": [[]]}, "crop_size"),
    "a switch in words": ({"do_resize": "yes"}, "do_resize"),
    "a switch that is a number": ({"do_normalize": 3}, "do_normalize"),
    "a switch that is a list": ({"do_center_crop": []}, "do_center_crop"),
    "a merge of no patch": ({"merge_size": 0}, "merge_size"),
    "a patch of no pixel": ({"patch_size": 0}, "patch_size"),
    "most pixels below 0": ({"max_pixels": -1}, "max_pixels"),
    "least pixels beyond all": ({"min_pixels": 10**12}, "min_pixels"),
    "10^9 tiles": ({"max_image_tiles": 10**9}, "max_image_tiles"),
}
NUMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "an epsilon below 0": ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    "an epsilon of 0": ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    "an epsilon of 1e30": ({"rms_norm_eps": 1e30}, "rms_norm_eps"),
    "an epsilon of NaN": ({"rms_norm_eps": float("nan")}, "finite"),
    "rotary angles below 0": ({"rope_theta": -10_000.0}, "rope_theta"),
    "rotary angles of 0": ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
    "rotary angles of Infinity": ({"rope_theta": float("inf")}, "finite"),
    "a rotary factor of 0": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
    "a rotary factor below 0": ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "factor"),
    "padding beyond the embedding": ({"pad_token_id": 512}, "pad_token_id"),
    "padding below -1": ({"pad_token_id": -7}, "pad_token_id"),
    "an end token below 0": ({"eos_token_id": -3}, "eos_token_id"),
    "an end token of 10^12": ({"eos_token_id": [2, 10**12]}, "eos_token_id"),
    "a window of 0": ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "features of layer -99": ({"vision_feature_layer": -99}, "vision_feature_layer"),
    "features of layer 99": ({"vision_feature_layer": 99}, "vision_feature_layer"),
    "features of several layers, one of them 5": ({"vision_feature_layer": [-1, 5]}, "vision_feature_layer"),
    "features of a layer in words": ({"vision_feature_layer": "last"}, "vision_feature_layer"),
    "an image token at the vocabulary's end": ({"image_token_index": 581}, "image_token_index"),
    "an image token far beyond": ({"image_token_index": 10**12}, "image_token_index"),
    "a negative image token": ({"image_token_index": -3}, "image_token_index"),
    "a decoder's epsilon below 0": ({"text_config.rms_norm_eps": -1.0}, "text_config.rms_norm_eps"),
    "a tower's epsilon below 0": ({"vision_config.layer_norm_eps": -1.0}, "vision_config.layer_norm_eps"),
    "a decoder's padding beyond its embedding": ({"text_config.pad_token_id": 581}, "text_config.pad_token_id"),
    "a decoder's heads that don't divide": ({"text_config.num_key_value_heads": 3}, "text_config.num_key_value_heads"),
    "a tower's key heads that don't divide": ({"vision_config.num_key_value_heads": 3}, "num_key_value_heads"),
}
TOKENIZERS: dict[str, tuple[str, str | bytes, str]] = {
    "settings that are a list": ("tokenizer_config.json", "[]", "tokenizer_config.json"),
    "settings that are no JSON": ("tokenizer_config.json", "{", "tokenizer_config.json"),
    "a vocabulary outside of the folder": ("tokenizer_config.json", '{"vocab_file": "/etc/passwd"}', "vocab_file"),
    "merges outside of the folder": ("tokenizer_config.json", '{"merges_file": "../../m.txt"}', "merges_file"),
    "ends of generation that are no JSON": ("generation_config.json", "{", "generation_config.json"),
    "an end of generation below 0": ("generation_config.json", '{"eos_token_id": -5}', "eos_token_id"),
    "an end of generation in words": ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id"),
    "an end of generation beyond the vocabulary": ("generation_config.json", '{"eos_token_id": 4294967296}', "eos_token_id"),
    "code that generates": ("generation_config.json", '{"custom_generate": "user/repo"}', "custom_generate"),
    "a tokenizer of audio": ("processor_config.json", '{"audio_tokenizer": {"audio_tokenizer_class": "A"}}', "audio_tokenizer"),
    "a tokenizer of audio in a file": ("audio_tokenizer_config.json", "{}", "audio_tokenizer_config.json"),
    "settings of a processor that are a list": ("processor_config.json", "[]", "processor_config.json"),
}  # fmt: skip


def read_generally(path: Path) -> None:
    from srcfast.models import load_lvlm

    load_lvlm(path, backbone="transformers")


def _processor(change: dict[str, Any]) -> str:
    sound = json.loads((ASSETS / "base" / "preprocessor_config.json").read_text())
    return json.dumps(sound | change)


def cases() -> list[Case]:
    """All of them, by both backbones."""
    found = []
    backbones: dict[str, Callable[[Path], None]] = {"hand-written": read_lvlm, "transformers": read_generally}
    for backbone, read in backbones.items():
        for wrong, (change, word) in PROCESSOR.items():
            make = lvlm({}, files={"preprocessor_config.json": _processor(change)})
            found.append(Case(f"Image processors, {backbone}", wrong, make, read, (word,)))
        for wrong, (change, word) in CONFIGS.items():
            found.append(Case(f"Configs of LVLMs, {backbone}", wrong, lvlm(change), read, ("config.json", word)))
        for wrong, (file, text, word) in TOKENIZERS.items():
            found.append(Case(f"Tokens, {backbone}", wrong, lvlm({}, files={file: text}), read, (word,)))
    for wrong, (change, word) in NUMBERS.items():
        make = model({"config.json": json.dumps(CONFIG | change)})
        found.append(Case("config.json", wrong, make, read_model, ("config.json", word)))
    return found
