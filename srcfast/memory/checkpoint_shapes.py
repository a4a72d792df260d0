"""Sizes of a checkpoint's model without reading its weights: from its files' headers, or from its config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from srcfast.memory.model_sizes import read_headers
from srcfast.models.checkpoint import read_config
from srcfast.models.fused_modules import Replaced, replaced_in
from srcfast.models.lvlm import is_handwritten, picks_handwritten
from srcfast.models.pretrained import check_runs, has_vision, meta_model
from srcfast.models.processor import typical_image_tokens
from srcfast.models.quantized import plain_linears
from srcfast.models.text_model import build_decoder
from srcfast.models.transformers_decoder import text_model
from srcfast.models.vision import bare_model


@dataclass(frozen=True)
class CheckpointShapes:
    """What `ModelSizes.of_tensors` counts from.

    Attributes:
        tensors: shapes by name, vision included.
        linears: names of the weights of the blocks' linears, where transformers' own layers run; None: hand-written ones do.
        config: transformers'.
        image_tokens: positions of a typical image, where the processor decides them, as it does of all but LLaVA checkpoints.
        replaced: what of transformers' own layers srcfast replaces.
    """

    tensors: dict[str, list[int]]
    linears: frozenset[str] | None
    config: Any
    image_tokens: int | None = None
    replaced: Replaced = "nothing"


def checkpoint_shapes(path: str | Path, backbone: str) -> CheckpointShapes:
    """Read the shapes of a checkpoint: from the headers of its weight files, or from config.json where it has none.

    Args:
        path: directory of an LVLM, or of a text model.
        backbone: the setting `model.backbone`; of a text model, auto.

    Raises:
        InputError: no config.json, or an architecture that srcfast does not run; a weight file that is damaged.
    """
    config, path = read_config(path), Path(path)
    stored = dict(read_headers(path))
    vision = has_vision(config)
    if picks_handwritten(config, backbone) if vision else is_handwritten(config):
        counted = _handwritten_tensors(config, path)
        # Weights that bitsandbytes quantised are stored as bytes and scales, whose shapes are not the weights'.
        whole = stored and not any(name.endswith(".absmax") for name in stored)
        return CheckpointShapes(stored if whole else counted, None, config)
    check_runs(config, path)
    # By the model's own names, since those in files may be others, which transformers converts.
    model = meta_model(AutoModelForImageTextToText if vision else AutoModelForCausalLM, path, config)
    layers = text_model(model).layers
    blocks = {id(linear.weight) for linear in plain_linears(layers)}
    linears = frozenset(name for name, parameter in model.named_parameters() if id(parameter) in blocks)
    # Of LLaVA checkpoints whose text model the hand-written decoder has, config.json decides it.
    tokens = typical_image_tokens(path, config) if vision and not is_handwritten(config) else None
    return CheckpointShapes(_shapes(model), linears, config, tokens, replaced_in(layers))


def _handwritten_tensors(config: Any, path: Path) -> dict[str, list[int]]:
    text = getattr(config, "text_config", config)
    if text is not config:
        text.tie_word_embeddings = bool(config.tie_word_embeddings)
    modules: list[nn.Module] = [build_decoder(text, path, "meta", torch.float32)]
    if text is not config:
        with torch.device("meta"):
            modules.append(bare_model(config))
    return {name: shape for module in modules for name, shape in _shapes(module).items()}


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in module.named_parameters()}
