"""LoRA on the linear layers of decoder, projector and vision tower (Hu et al., 2021), read and written as PEFT does."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srcfast.config.settings import LoRAConfig
from srcfast.data.jsonl import parse_object, regular, write_json
from srcfast.errors import InputError, SrcfastError
from srcfast.hub.names import name_of
from srcfast.models.checkpoint import READ, read_file, save_tensors
from srcfast.models.peft_settings import COMPUTED, PeftSettings
from srcfast.models.protocols import HasDecoder, TransformerDecoder
from srcfast.models.quantized import NF4Linear, block_linears
from srcfast.models.sharding import is_sharded
from srcfast.models.vision_adapters import (
    PROJECTOR,
    chosen_linears,
    is_of_vision,
    stored_name,
    tower_layer,
    vision_linears,
    vision_of,
)
from srcfast_kernels import swiglu
from srcfast_kernels.dropout import dropout_product
from srcfast_kernels.lora_linear import Adapted, Norm, lora_linears, swiglu_lora_linear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWERS = ("vision_tower", "vision_model", "vision_encoder", "visual.")  # in names of an image encoder's layers
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


class LoRALinear(nn.Module):
    """A frozen linear with an adapter; `number` distinguishes its dropout from that of the decoder's other linears."""

    def __init__(
        self, base: nn.Linear | NF4Linear, config: LoRAConfig, device: torch.device, dtype: torch.dtype, number: int = 0
    ) -> None:
        super().__init__()
        self.base: Any = base
        self.lora_A = nn.Parameter(torch.empty(config.r, base.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.r, device=device, dtype=dtype))
        self.alpha, self.scaling = config.alpha, config.alpha / config.r
        self.dropout = config.dropout
        self.number = number
        self.active = True
        # [T] dropout keys of the rows of the next pass, where no caller passes them.
        self.row_keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.base(x)
        rows = x.reshape(-1, x.shape[-1])  # [T, in]
        return project(rows, self, keys=self.row_keys)[0].view(*x.shape[:-1], -1)

    def adapted(self, dtype: torch.dtype) -> Adapted:
        """Cast the adapter to `dtype` for `lora_linears`."""
        a, b = self.lora_A.to(dtype), self.lora_B.to(dtype)
        return Adapted(self.base.weight, self.base.bias, a, b, self.scaling)


def project(
    x: Tensor, *linears: nn.Module, norm: nn.Module | None = None, keys: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Apply linears to one input [T, in], after the norm if there is one; returns [T, out_i] each. Adapted ones run fused.

    `keys` are the rows' dropout keys, [T] int64; see `Decoder.dropout_keys`.
    """
    if not all(_is_adapted(linear) for linear in linears):
        x = x if norm is None else norm(x)
        return tuple(_project_one(x, linear, keys) for linear in linears)
    if any(linear.training and linear.dropout for linear in linears):  # each linear drops other entries of x
        x = x if norm is None else norm(x)
        return tuple(_with_dropout(x, linear, keys) for linear in linears)
    adapted = [linear.adapted(x.dtype) for linear in linears]
    if norm is None or norm.weight.requires_grad:
        return lora_linears(x if norm is None else norm(x), adapted)
    return lora_linears(x, adapted, Norm(norm.weight, norm.eps))


def _project_one(x: Tensor, linear: nn.Module, keys: Tensor | None) -> Tensor:
    if not isinstance(linear, LoRALinear):
        return linear(x)
    return project(x, linear, keys=keys)[0] if linear.active else linear.base(x)


def project_swiglu(gate: Tensor, up: Tensor, linear: nn.Module, keys: Tensor | None = None) -> Tensor:
    """Apply a linear to silu(gate) * up, [T, in] each; returns [T, out]. An adapted one saves no product for backward."""
    if _is_adapted(linear) and not (linear.training and linear.dropout):
        return swiglu_lora_linear(gate, up, linear.adapted(gate.dtype))
    return project(swiglu(gate, up), linear, keys=keys)[0]


def _is_adapted(linear: nn.Module) -> bool:
    return isinstance(linear, LoRALinear) and linear.active


def _with_dropout(x: Tensor, linear: nn.Module, keys: Tensor | None) -> Tensor:
    if keys is None:
        raise SrcfastError(
            "lora.dropout: expected the rows' keys, which decide what is dropped, found none. Fix: train with "
            "srcfast.training.loop, or set model.decoder.dropout_keys to [T] int64 before each forest"
        )
    adapter = linear.adapted(x.dtype)
    low = dropout_product(x, keys, linear.number, linear.dropout, adapter.lora_a)  # [T, r]
    return torch.addmm(linear.base(x), low, adapter.lora_b.T, alpha=adapter.scaling)


def apply_lora(model: HasDecoder, lora: str | Path | LoRAConfig | None) -> None:
    """Give a model a new adapter (LoRAConfig), a saved one (directory), or none.

    Raises:
        InputError: see `add_lora` and `load_adapter`.
    """
    if isinstance(lora, LoRAConfig):
        add_lora(model, lora)
    elif lora is not None:
        load_adapter(model, lora)


def check_adapter_changes(model: HasDecoder, directory: str | Path) -> None:
    """Raise InputError where the adapter read from the directory changes nothing: the base's results would pass for its.

    Training may begin with such an adapter: new ones of PEFT change nothing.
    """
    layers = adapters(model)
    if not any(layer.scaling and layer.lora_A.any() and layer.lora_B.any() for layer in layers.values()):
        file, fix = Path(directory) / ADAPTER_WEIGHTS, "train the adapter first, or leave it out"
        found = f"{len(layers)} adapted layers whose lora_B @ lora_A is zero in all of them"
        expected = "an adapter that changes the model"
        raise InputError(file=file, field="lora_B", expected=expected, found=found, fix=fix)


@torch.no_grad()
def add_lora(model: HasDecoder, config: LoRAConfig) -> None:
    """Add a trainable adapter to the target layers; A is drawn as PEFT draws it, B is zero.

    Raises:
        InputError: no layer of that name, a rank below 1, an adapter is there already, or the model's projector or tower can't
            have one.
    """
    check_no_adapter(model)
    generator = torch.Generator().manual_seed(config.seed)
    config = config.replace(target_modules=check_targets(model, config))
    chosen = {
        number: (name, linear)
        for number, (name, linear) in enumerate(_named_linears(model.decoder).items())
        if name.rpartition(".")[2] in config.target_modules
    }
    # Drawn last: the decoder's adapter is the same with and without them.
    chosen |= enumerate(chosen_linears(model, config).items(), start=len(_named_linears(model.decoder)))
    layers = {}
    for number, (name, linear) in chosen.items():
        adapted = layers[name] = _adapt(model, name, linear, config, number)
        bound = math.sqrt(3.0) / math.sqrt(3.0 * linear.in_features)  # kaiming_uniform_(a=sqrt(5)): 1 / sqrt(in)
        drawn = torch.rand(config.r, linear.in_features, generator=generator, dtype=torch.float64)
        adapted.lora_A.copy_((2.0 * drawn - 1.0) * bound)
    _set_linears(model, layers)
    model.adapter_path, model.lora_config = None, config


def check_targets(model: HasDecoder, config: LoRAConfig) -> tuple[str, ...]:
    """Return the names of the decoder's layers that an adapter of these settings is of.

    Raises:
        InputError: there is none; or projector or tower can't have the adapters that are asked for.
    """
    chosen_linears(model, config)
    linears = (name for _, name, _ in block_linears(model.decoder))
    stacked = has_stacked_experts(name for name, _ in model.decoder.named_parameters())
    return target_names(config, linears, stacked)


def _named_linears(decoder: TransformerDecoder) -> dict[str, nn.Linear | NF4Linear]:
    """Map names within the decoder to the linears of its blocks, in the order of `block_linears`."""
    names = {module: name for name, module in decoder.named_modules()}
    return {f"{names[parent]}.{name}": linear for parent, name, linear in block_linears(decoder)}


def _adapt(model: HasDecoder, name: str, linear: nn.Linear | NF4Linear, config: LoRAConfig, number: int) -> LoRALinear:
    """Make an adapter around the linear of this name, see `adapters`; `_set_linears` puts it in its place."""
    embedding = model.decoder.embed_tokens.weight
    exact = torch.promote_types(embedding.dtype, torch.float32)
    if is_of_vision(name):  # its rows are patches, which have no dropout keys
        config = config.replace(dropout=0.0)
    adapted = LoRALinear(linear, config, embedding.device, exact, number)
    adapted.train(linear.training)
    return adapted


def _set_linears(model: HasDecoder, linears: Mapping[str, nn.Module]) -> None:
    """Put linears, or those with their adapters, in the places of these names, see `adapters`."""
    vision = vision_of(model) if any(map(is_of_vision, linears)) else None
    with nullcontext() if vision is None else vision.changing_adapters():
        for name, linear in linears.items():
            root = vision.model if vision is not None and is_of_vision(name) else model.decoder
            parent, _, last = name.rpartition(".")
            setattr(root.get_submodule(parent), last, linear)


def target_names(config: LoRAConfig, linears: Iterable[str], stacked: bool) -> tuple[str, ...]:
    """Return the names of the linears to adapt, of those that a decoder's blocks have.

    The default means all of them, by whatever names a family has: fused ones, experts' projections. Where the decoder has
    stacked experts, PEFT 0.21 takes the names of feed-forwards for adapters of transformers 4, which had a linear for each
    expert; so dense layers and shared experts of these names get none.

    Raises:
        InputError: the blocks have no linear of a name.
    """
    names = dict.fromkeys(name for name in linears if not (stacked and name in ("gate_proj", "up_proj", "down_proj")))
    if {*config.target_modules} == {*TARGETS} and not {*TARGETS} <= {*names}:
        return tuple(names)
    if missing := sorted(set(config.target_modules) - {*names}):
        expected = f"layers among {', '.join(names)}"
        raise InputError(field="target_modules", expected=expected, found=", ".join(missing))
    return config.target_modules


def has_stacked_experts(parameters: Iterable[str]) -> bool:
    """Return whether parameters of these names are those of a decoder that stores its experts as one tensor."""
    # In 4 bits a parameter's name is followed by that of its codes.
    return any(name.removesuffix(".flat").endswith("experts.gate_up_proj") for name in parameters)


def adapters(model: HasDecoder) -> dict[str, LoRALinear]:
    """Map names to the adapted layers: names within the decoder, and those of `vision_adapters`."""
    layers = {name: module for name, module in model.decoder.named_modules() if isinstance(module, LoRALinear)}
    if (vision := vision_of(model)) is not None:
        layers |= {name: module for name, module in vision.model.named_modules() if isinstance(module, LoRALinear)}
    return layers


def remove_adapter(model: HasDecoder) -> None:
    """Replace each adapted layer by its base layer; the weights are those before the adapter."""
    model.adapter_path = None
    _set_linears(model, {name: layer.base for name, layer in adapters(model).items()})


def check_no_adapter(model: HasDecoder) -> None:
    """Raise InputError where the model has an adapter."""
    if layers := adapters(model):
        found, fix = f"{len(layers)} adapted layers", "merge the adapter first (merge_lora)"
        raise InputError(field=next(iter(layers)), expected="a model without an adapter", found=found, fix=fix)


def lora_parameters(model: HasDecoder) -> list[nn.Parameter]:
    """List the adapter's parameters."""
    return list(_named_parameters(model).values())


def _named_parameters(model: HasDecoder) -> dict[str, nn.Parameter]:
    """Map names as in `adapters`, such as "layers.0.mlp.up_proj.lora_A", to the adapter's parameters."""
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in adapters(model).items():
        parameters |= {f"{name}.lora_A": layer.lora_A, f"{name}.lora_B": layer.lora_B}
    return parameters


@contextmanager
def disable_lora(model: HasDecoder) -> Iterator[None]:
    """Switch the adapter off within: outputs are the base model's."""
    layers = adapters(model).values()
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


@contextmanager
def folded_lora(model: HasDecoder) -> Iterator[None]:
    """Add the adapter into the base weights within, for decoding, where its small products cost much; outputs stay the same.

    Weights of 16 or 4 bits are not folded, since they would be rounded again; nor are sharded ones.
    """
    foldable = {} if is_sharded(model.decoder) else adapters(model)
    layers = [layer for layer in foldable.values() if isinstance(layer.base, nn.Linear) and layer.active]
    layers = [layer for layer in layers if layer.base.weight.dtype in (torch.float32, torch.float64)]
    weights = [layer.base.weight.data for layer in layers]
    for layer in layers:
        layer.base.weight.data = layer.base.weight.data + layer.scaling * (layer.lora_B.data @ layer.lora_A.data)
        layer.active = False
    try:
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.base.weight.data = weight
            layer.active = True


@torch.no_grad()
def merge_lora(model: HasDecoder) -> int:
    """Add the adapter into the base weights and remove it; returns the number of merged matrices."""
    layers = adapters(model)
    for name, layer in layers.items():
        if not isinstance(layer.base, nn.Linear):
            raise InputError(field=name, expected="a base weight in 16 or 32 bits", found=type(layer.base).__name__)
        exact = torch.promote_types(layer.base.weight.dtype, torch.float32)
        change = layer.scaling * (layer.lora_B.to(exact) @ layer.lora_A.to(exact))
        layer.base.weight.copy_(layer.base.weight.to(exact) + change)
    _set_linears(model, {name: layer.base for name, layer in layers.items()})
    return len(layers)


def save_adapter(model: HasDecoder, directory: str | Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT does, each atomically, the config last.

    Raises:
        InputError: the model has no adapter.
    """
    directory = Path(directory)
    if not (parameters := _named_parameters(model)):
        raise InputError(file=directory, expected="a model with an adapter", found="none")
    config, prefix = model.lora_config, model.adapter_prefix
    tensors = {
        f"base_model.model.{_full_name(model, name)}.weight": parameter for name, parameter in parameters.items()
    }
    save_tensors(directory / ADAPTER_WEIGHTS, tensors)
    # Lists alone: servers read no regular expression here. The vision tower has q_proj and the like, too, and must stay as it is.
    targets = sorted(config.target_modules, key=lambda name: (*TARGETS, name).index(name))
    excluded = None if prefix == "model" else rf"(?!.*{prefix.rpartition('.')[2]}\.).*"
    layers = adapters(model)
    of_vision = any(map(is_of_vision, layers))
    if of_vision or any(
        name not in layers for name in _named_linears(model.decoder) if name.rpartition(".")[2] in config.target_modules
    ):
        targets, excluded = [_full_name(model, name) for name in layers], None
    # A tower's layers have numbers, too.
    named = {_full_name(model, name) if of_vision else name: layer for name, layer in layers.items()}
    rank, ranks = _common({name: len(layer.lora_A) for name, layer in named.items()})
    alpha, alphas = _common({name: layer.alpha for name, layer in named.items()})
    base = name_of(model.path)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.path) if base is None else base.repository,
        **({} if base is None else {"revision": base.revision}),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        **({"exclude_modules": excluded} if excluded else {}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        **({"rank_pattern": ranks} if ranks else {}),
        **({"alpha_pattern": alphas} if alphas else {}),
    }
    write_json(directory / ADAPTER_CONFIG, settings)


def _full_name(model: HasDecoder, name: str) -> str:
    """Return transformers' name of what has this name in `adapters`."""
    return f"model.{name}" if is_of_vision(name) else f"{model.adapter_prefix}.{name}"


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent of layers' values, and the others' by a pattern of the layer's name."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {re.escape(name): value for name, value in values.items() if value != common}


def load_adapter(model: HasDecoder, directory: str | Path, trainable: bool = True) -> None:
    """Read a PEFT LoRA adapter into a model that has none yet.

    Raises:
        InputError: a file is missing or damaged, a setting is not computed, or the adapter does not fit the model; the tensor is
            named.
    """
    check_no_adapter(model)
    directory = Path(directory)
    file = directory / ADAPTER_WEIGHTS
    with _naming_files(directory):
        raw = parse_object(regular(directory / ADAPTER_CONFIG).read_bytes())
        tensors = dict(read_file(file))
    settings = PeftSettings.read(raw, directory / ADAPTER_CONFIG)
    weights = _by_name(tensors, file, vision_of(model) is not None)
    adapted = {name.rpartition(".")[0] for name in weights}
    linears: dict[str, nn.Linear | NF4Linear] = {**_named_linears(model.decoder)}
    kinds = _target_modules(weights, {name.rpartition(".")[2] for name in linears}, file)
    if any(map(is_of_vision, adapted)):
        linears |= vision_linears(model)
    targets = {name: _full_name(model, name) for name in linears}
    _check_layers({name for name, path in targets.items() if settings.targets(path)}, weights, file)
    values: dict[str, Any] = {"dropout": float(settings.lora_dropout), "target_modules": kinds}
    values |= _vision_settings(model, adapted)
    layers = {}
    for number, (name, linear) in enumerate(linears.items()):
        if name in adapted:
            rank, alpha = settings.rank_and_alpha(targets[name])
            layers[name] = _adapt(model, name, linear, LoRAConfig(r=rank, alpha=alpha, **values), number)
    _set_linears(model, layers)
    model.adapter_path = directory
    model.lora_config = LoRAConfig(r=settings.r, alpha=float(settings.lora_alpha), **values)
    parameters = _named_parameters(model)
    _check_shapes(parameters, weights, file)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
            parameter.requires_grad_(trainable)


@contextmanager
def _naming_files(directory: Path) -> Iterator[None]:
    """Turn an error of reading an adapter's files into an InputError that names both; one that names a tensor stays."""
    try:
        yield
    except (OSError, ValueError, InputError) as error:
        if isinstance(error, InputError) and error.field is not None:
            raise
        expected = f"an adapter: {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
        raise InputError(file=directory, expected=expected, found=error) from error


def _by_name(tensors: Mapping[str, Tensor], file: Path, vision: bool) -> dict[str, Tensor]:
    """Name an adapter's tensors as `_named_parameters` does; `vision`: projector and tower can have adapters.

    Raises:
        InputError: a tensor belongs to no layer that can have an adapter.
    """
    weights = {}
    for key, tensor in tensors.items():
        layer, _, part = key.partition(".lora_")
        start, is_part = layer.find("layers."), part in ("A.weight", "B.weight")
        name = stored_name(layer) if vision and is_part else None
        for fits, expected, found in (
            (name is not None or (start >= 0 and is_part), "lora_A or lora_B of a decoder layer", key),
            (name is not None or not any(tower in layer for tower in TOWERS), "layers of the decoder only", key),
            (tensor.dtype in READ, "numbers in 16, 32 or 64 bits", str(tensor.dtype).removeprefix("torch.")),
        ):
            if not fits:
                raise InputError(file=file, field=key, expected=expected, found=found)
        weights[f"{layer[start:] if name is None else name}.lora_{part.removesuffix('.weight')}"] = tensor
    return weights


def _vision_settings(model: HasDecoder, adapted: Collection[str]) -> dict[str, Any]:
    """Return the settings of `LoRAConfig` by which layers of these names get adapters. Raises InputError as `chosen_linears`."""
    layers = [layer for name in adapted if is_of_vision(name) and (layer := tower_layer(name)) is not None]
    vision = vision_of(model)
    count = max(0, vision.used_layers - min(layers)) if layers and vision is not None else 0
    settings = {"projector": any(name.startswith(PROJECTOR) for name in adapted), "tower_layers": count}
    chosen_linears(model, LoRAConfig(**settings))  # type: ignore[arg-type]
    return settings


def _target_modules(weights: Mapping[str, Tensor], known: Collection[str], file: Path) -> tuple[str, ...]:
    """List the kinds of layers that have weights. Raises InputError where there are none, or the model has no such layer."""
    if not weights:
        raise InputError(file=file, expected="an adapter's tensors", found="none")
    targets = {name.split(".")[-2] for name in weights if not is_of_vision(name)}
    if unknown := sorted(targets - {*known}):
        expected = f"layers among {', '.join(sorted(known, key=lambda name: (*TARGETS, name).index(name)))}"
        raise InputError(file=file, field="target_modules", expected=expected, found=", ".join(unknown))
    return tuple(sorted(targets))


FIX = "this adapter belongs to another base"


def _check_layers(targets: Collection[str], weights: Mapping[str, Tensor], file: Path) -> None:
    """Raise InputError where weights are not those of just the layers that PEFT would adapt."""
    stored = {name.rpartition(".")[0] for name in weights}
    if difference := sorted({*targets} ^ stored):
        expected = "one adapter for each target layer of this model"
        found = f"{len(stored)} adapted layers, the settings choose {len(targets)} of the model's"
        raise InputError(file=file, field=difference[0], expected=expected, found=found, fix=FIX)


def _check_shapes(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], file: Path) -> None:
    """Raise InputError where weights have other shapes than these parameters."""
    for name, parameter in parameters.items():
        shape = list(weights[name].shape) if name in weights else None
        if shape != list(parameter.shape):
            rank = 0 if name.endswith("lora_A") else 1
            other_rank = shape is not None and len(shape) == 2 and shape[1 - rank] == parameter.shape[1 - rank]
            fix = "r and rank_pattern in adapter_config.json do not fit these weights" if other_rank else FIX
            expected = f"shape {list(parameter.shape)}"
            raise InputError(file=file, field=name, expected=expected, found=shape or "none", fix=fix)


def adapter_hash(directory: str | Path) -> str:
    """Hash an adapter's weights and the settings that change its outputs (SHA-256)."""
    directory = Path(directory)
    with _naming_files(directory):
        settings = parse_object(regular(directory / ADAPTER_CONFIG).read_bytes())
        weights = regular(directory / ADAPTER_WEIGHTS).read_bytes()
    relevant = {key: settings.get(key) for key in ("r", "lora_alpha", "target_modules")}
    # The others only where they are set, so that hashes stay what they were.
    relevant |= {key: settings[key] for key in COMPUTED if key != "lora_dropout" and settings.get(key)}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode())
    digest.update(weights)
    return digest.hexdigest()
