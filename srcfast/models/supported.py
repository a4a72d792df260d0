"""Say which language models of transformers the general backbone runs, and of the others what they would need."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import transformers

from srcfast.errors import InputError
from srcfast.models.encoded_images import takes_encoded_images
from srcfast.models.recurrent import LAYERS

ANOTHER_FAMILY = "choose a checkpoint of another family; see docs/models.md"  # the fix where a model is not run
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")
# Of a text config: fields that are set where attention or the head does what the forest does not do yet, and what that is.
FEATURES = {
    "kv_lora_rank": "latent attention, whose values have another size than its keys",
    "v_head_dim": "values of another size than keys",
    "cross_attention_layers": "cross-attention to images",
    "index_topk": "attention to the keys that an indexer selects",
    "attention_chunk_size": "attention within chunks",
    "use_bidirectional_attention": "two-way attention",
}


def check_supported(config: Any, model_class: Any, path: Any) -> None:
    """Raise InputError, by name, where the general backbone does not run a config.

    Args:
        config: of the whole model.
        model_class: transformers' class of it.
        path: of the checkpoint.
    """
    _refuse(chain(_obstacles(config), _form_obstacles(model_class)), config, path)


def check_text_supported(config: Any, path: Any) -> None:
    """Raise InputError, by name, where the general backbone does not run a text model's config."""
    _refuse(_obstacles(config), config, path)


def _refuse(obstacles: Iterator[tuple[str, str, str]], config: Any, path: Any) -> None:
    """Raise InputError at the first obstacle (field, value, what it would need)."""
    for field, found, needed in obstacles:
        raise InputError(
            file=path,
            field=field,
            expected="a model whose layers are causal attention over all that is before",
            found=f"{config.model_type}: {found}, which needs {needed}",
            fix=ANOTHER_FAMILY,
        )


def _obstacles(config: Any) -> Iterator[tuple[str, str, str]]:
    """Yield (field, value, what it would need) of what the backbone does not run."""
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        yield "is_encoder_decoder", "true", "an encoder"
    others = sorted({str(kind) for kind in getattr(text, "layer_types", None) or ()} - {*ATTENTION_LAYERS, *LAYERS})
    if others:
        yield "text_config.layer_types", ", ".join(others), "layers other than attention on the forest"
    for field, needed in FEATURES.items():
        value = _value_of(text, field)
        if value not in (None, False, 0, 1.0, "", "vision"):  # Gemma 4's two-way attention within images
            yield f"text_config.{field}", str(value), needed


def _value_of(text: Any, field: str) -> Any:
    """Return a field of a text config; None where it has none."""
    try:
        return getattr(text, field, None)
    except Exception:  # of transformers' own, where the layers have different values
        return "different by layer"


def _form_obstacles(model_class: Any) -> Iterator[tuple[str, str, str]]:
    """Yield what keeps a class of LVLMs from taking encoded images as the backbone hands them over."""
    if not takes_encoded_images(model_class):
        needed = "a model that takes encoded images"
        yield "model_type", f"{model_class.__name__} of transformers {transformers.__version__}", needed


def attention_layers(config: Any) -> list[int]:
    """List the numbers of the layers of a text config that are attention; the others are recurrent."""
    kinds = getattr(config, "layer_types", None) or [ATTENTION_LAYERS[0]] * config.num_hidden_layers
    return [number for number, kind in enumerate(kinds) if kind in ATTENTION_LAYERS]


def logit_scales(config: Any) -> list[float]:
    """List the factors on logits that a config names; whether a class applies them is seen from its logits."""
    text = config.get_text_config()
    multiplied, divided = getattr(text, "logit_scale", None), getattr(text, "logits_scaling", None)
    return [*([float(multiplied)] if multiplied else []), *([1.0 / float(divided)] if divided else [])]


def logit_caps(config: Any) -> list[float]:
    """List the soft caps on logits that a config names; whether a class applies them is seen from its logits."""
    cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return [float(cap)] if cap else []
