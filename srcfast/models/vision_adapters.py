"""Which linears of an LVLM's projector and vision tower get adapters, and what transformers and PEFT call them.

Adapters of the decoder are named from the decoder on ("layers.0.mlp.up_proj"), these from transformers' `model` on
("multi_modal_projector.linear_1", "vision_tower.encoder.layers.3.mlp.fc1").
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from srcfast.config.settings import LoRAConfig
from srcfast.errors import InputError
from srcfast.models.protocols import HasDecoder
from srcfast.models.vision import FAMILIES, Vision, used_layers

PROJECTOR, TOWER = "multi_modal_projector.", "vision_tower."
_LAYER = re.compile(r"(.*\.layers\.)(\d+)\.(.+)")


def is_of_vision(name: str) -> bool:
    """Return whether an adapter of this name is on the projector or tower, not on the decoder."""
    return name.startswith((PROJECTOR, TOWER))


def vision_of(model: HasDecoder) -> Vision | None:
    """Return projector and tower where they can have adapters; None for a text model and transformers' own models."""
    vision = getattr(model, "vision", None)
    return vision if isinstance(vision, Vision) else None


def vision_linears(model: HasDecoder) -> dict[str, nn.Linear]:
    """Map names to the linears of the tower's layers and of the projector, in the order in which images pass them."""
    if (vision := vision_of(model)) is None:
        return {}
    linears = {name: part for name, part in vision.model.named_modules() if isinstance(part, nn.Linear)}
    tower = {name: linear for name, linear in linears.items() if name.startswith(TOWER) and _LAYER.match(name)}
    return tower | {name: linear for name, linear in linears.items() if name.startswith(PROJECTOR)}


def chosen_linears(model: HasDecoder, config: LoRAConfig) -> dict[str, nn.Linear]:
    """Return those of `vision_linears` that the settings adapt.

    Raises:
        InputError: the model's projector and tower can't have adapters, or its tower has fewer layers.
    """
    if not config.projector and not config.tower_layers:
        return {}
    field = "lora.projector" if config.projector else "lora.tower_layers"
    check_family(field, vision_of(model) is not None, getattr(getattr(model, "vision", None), "config", None))
    vision, linears = vision_of(model), vision_linears(model)
    assert vision is not None
    if not config.projector:
        linears = {name: linear for name, linear in linears.items() if not name.startswith(PROJECTOR)}
    used = vision.used_layers
    if config.tower_layers > used:
        expected = f"at most {used}, the layers of this tower that embeddings are made of"
        raise InputError(field="lora.tower_layers", expected=expected, found=config.tower_layers)
    if config.tower_layers:
        vision.check_layers(used - config.tower_layers)
    adapted = range(used - config.tower_layers, used)
    return {
        name: linear for name, linear in linears.items() if name.startswith(PROJECTOR) or tower_layer(name) in adapted
    }


def check_family(field: str, runs: bool, config: Any) -> None:
    """Raise InputError unless the model `runs` as one whose projector and tower can have adapters; config: transformers'."""
    if not runs:
        kind = getattr(config, "model_type", "a text model")
        found = f"{kind} with the transformers backbone" if kind in FAMILIES else kind
        expected = (
            "LLaVA-1.5 or LLaVA-NeXT with the handwritten backbone, whose projector and tower alone can have adapters"
        )
        fix = "take such a model, or lora.projector=false lora.tower_layers=0"
        raise InputError(field=field, expected=expected, found=found, fix=fix)


def tower_layer(name: str) -> int | None:
    """Return the number of the tower's layer to which a parameter or linear belongs, by its name; None for all others."""
    match = _LAYER.match(name)
    return None if match is None or TOWER not in name else int(match[2])


def is_adapted_vision(name: str, config: Any, lora: LoRAConfig) -> bool:
    """Return whether the weight of this name is one of projector or tower that new adapters are of; config: transformers'."""
    if PROJECTOR in name:
        return lora.projector
    layer, used = tower_layer(name), used_layers(config)
    return layer is not None and name.endswith("weight") and used - lora.tower_layers <= layer < used


def is_read_in_steps(name: str, config: Any, lora: LoRAConfig) -> bool:
    """Return whether training reads this parameter of projector or tower in each step, so that it can't wait on the host."""
    if TOWER not in name:
        return True
    layer = tower_layer(name)
    return bool(lora.tower_layers) and layer is not None and layer >= used_layers(config) - lora.tower_layers


def stored_name(key: str) -> str | None:
    """Return the name of the linear of a tensor's key in an adapter of PEFT, without its end; None for the decoder's.

    transformers' names of a tower's layers have been "vision_model.encoder.layers" as well.
    """
    start = max(key.find(PROJECTOR), key.find(TOWER))
    return None if start < 0 else key[start:].replace(f"{TOWER}vision_model.", TOWER)
