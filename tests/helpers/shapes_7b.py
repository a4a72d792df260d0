"""Published config.json files without weights: LLaVA-1.5-7B's, and a 1.5B text model's for an R-Scorer."""

from __future__ import annotations

import json
from pathlib import Path

LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "model_type": "llava",
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064},
    "tie_word_embeddings": False,
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
SCORER = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}


def write_configs(directory: Path) -> tuple[Path, Path]:
    """Folders of the LVLM and of the R-Scorer, a config.json in each and nothing else."""
    folders = directory / "llava-1.5-7b", directory / "r-scorer-1.5b"
    for folder, config in zip(folders, (LLAVA, SCORER), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    return folders
