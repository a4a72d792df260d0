"""Build transformers' models of checkpoint directories: from safetensors alone, without remote code and without a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from srcfast.errors import InputError, SrcfastError
from srcfast.models.checkpoint import check_finite, check_weight_count
from srcfast.models.supported import ANOTHER_FAMILY, check_supported, check_text_supported


def model_class(config: Any, path: Path) -> Any:
    """Return transformers' class for a config. Raises InputError where it has none that turns images and text into text."""
    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    if known is None:
        raise InputError(
            file=path / "config.json",
            field="model_type",
            expected="a model that turns images and text into text",
            found=config.model_type,
            fix="choose the checkpoint of an LVLM",
        )
    return getattr(transformers, known if isinstance(known, str) else known[0])


def has_vision(config: Any) -> bool:
    """Return whether a config is an LVLM's."""
    return hasattr(config, "vision_config")


def check_runs(config: Any, path: Path) -> None:
    """Raise InputError, by name, where the general backbone does not run a checkpoint, as far as its config tells."""
    file = path / "config.json"
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            file=file,
            field="quantization_config",
            expected="whole weights, which srcfast quantises itself (model.quantize=nf4)",
            found="weights that are quantised already",
            fix="choose the checkpoint of whole weights",
        )
    if (
        path / "adapter_config.json"
    ).is_file():  # transformers would load the base that it names, from a hub or elsewhere
        raise InputError(
            file=path / "adapter_config.json",
            expected="a base model's directory",
            found="an adapter beside the base",
            fix="move the adapter's files to another directory",
        )
    if has_vision(config):
        return check_supported(config, model_class(config, path), file)
    if (
        config.model_type
        in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    ):
        raise InputError(
            file=file,
            field="vision_config",
            expected="an LVLM whose config names its vision tower",
            found=f"{config.model_type}, whose config names none",
            fix=ANOTHER_FAMILY,
        )
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            file=file,
            field="model_type",
            expected="a causal language model",
            found=config.model_type,
            fix="choose the checkpoint of one",
        )
    check_text_supported(config, file)


def load_pretrained(
    kind: Any,
    path: Path,
    config: Any,
    dtype: torch.dtype,
    *,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    shard: bool = False,
) -> Any:
    """Build a model by one of transformers' auto classes and read its weights, by transformers' own names.

    Each is cast, put on the device and, in the language model's blocks, quantised (`nf4`) before the next is read. Buffers stay
    on the host. With `shard` all weights stay there, for `sharding.shard_layers`; they are quantised on the device.

    Raises:
        InputError: transformers can't read it, or a tensor is missing, unexpected, misshaped or not finite.
    """
    from srcfast.models.streaming import Streaming  # takes a second, which commands that load nothing do not need

    check_weight_count([meta_model(kind, path, config)], path)
    streaming = Streaming(path, device, quantize == "nf4", shard)
    try:
        with streaming.reading(config) as options:
            model, report = kind.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, which is checked below; otherwise no tensor is named
                **options,
            )
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # ValueError for an unknown type, OSError for a missing file, ...
        found = f"{type(error).__name__}: {error}"
        raise InputError(file=path, expected="a checkpoint that transformers reads", found=found) from error
    for kind in ("missing", "unexpected", "mismatched"):
        # A mismatched one comes with its two shapes.
        if names := sorted(key if isinstance(key, str) else key[0] for key in report[f"{kind}_keys"]):
            raise InputError(file=path, field=names[0], expected=f"no {kind} tensors", found=f"{len(names)} {kind}")
    for name, parameter in model.named_parameters():
        if name not in streaming.checked:
            check_finite(parameter.detach(), path, name)
    return model


def meta_model(kind: Any, path: Path, config: Any) -> nn.Module:
    """Build a model by one of transformers' auto classes, with weights that take no memory. Raises InputError."""
    try:
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=False)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise InputError(
            file=path / "config.json", expected="a config of a model of transformers", found=found
        ) from error


@contextmanager
def refusing_other_forms(path: Path, config: Any) -> Iterator[None]:
    """Turn an error of any class, which a model of another form than most raises, into an InputError that names it."""
    try:
        yield
    except (SrcfastError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            file=path / "config.json",
            field="model_type",
            expected="a model that takes attention and encoded images as most of transformers' do",
            found=f"{config.model_type}: {type(error).__name__}: {error}",
            fix=ANOTHER_FAMILY,
        ) from error
