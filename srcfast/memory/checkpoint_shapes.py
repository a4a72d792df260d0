"""Sizes of a checkpoint's model without reading its weights: from its files' headers, or from its config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from srcfast.memory.model_sizes import read_headers
from srcfast.models.checkpoint import read_config
from srcfast.models.lvlm import is_handwritten
from srcfast.models.pretrained import check_runs, has_vision, meta_model
from srcfast.models.processor import typical_image_tokens
from srcfast.models.text_model import build_decoder
from srcfast.models.vision import bare_model


def checkpoint_shapes(path: str | Path) -> tuple[dict[str, list[int]], Any, int | None]:
    """Read the names and shapes of a checkpoint's tensors, vision included, its transformers config, and an image's positions.

    The positions are those of a typical image, where the processor decides them, as it does of all but LLaVA checkpoints.

    They come from the headers of its weight files, or from config.json where it has none. `ModelSizes.of_tensors` takes them.

    Raises:
        InputError: no config.json, or an architecture that srcfast does not run; a weight file that is damaged.
    """
    config = read_config(path)
    counted = _tensors_of_config(config, Path(path))
    stored = dict(read_headers(path))
    # Weights that bitsandbytes quantised are stored as bytes and scales, whose shapes are not the weights'.
    if stored and not any(name.endswith(".absmax") for name in stored):
        counted = stored
    general = has_vision(config) and not is_handwritten(config)
    return counted, config, typical_image_tokens(path, config) if general else None


def _tensors_of_config(config: Any, path: Path) -> dict[str, list[int]]:
    text = getattr(config, "text_config", config)
    if not is_handwritten(config):
        check_runs(config, path)
        kind = AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM
        return {name: list(tensor.shape) for name, tensor in meta_model(kind, path, config).named_parameters()}
    if text is not config:
        text.tie_word_embeddings = bool(config.tie_word_embeddings)
    modules: list[nn.Module] = [build_decoder(text, path, "meta", torch.float32)]
    if text is not config:
        with torch.device("meta"):
            modules.append(bare_model(config))
    return {name: list(tensor.shape) for module in modules for name, tensor in module.named_parameters()}
