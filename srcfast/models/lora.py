"""LoRA on the decoder's linear layers (Hu et al., 2021), read and written as PEFT does."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srcfast.config.settings import LoRAConfig
from srcfast.data.jsonl import parse_object, regular, write_json
from srcfast.errors import InputError, SrcfastError
from srcfast.models.checkpoint import READ, read_file, save_tensors
from srcfast.models.quantized import NF4Linear
from srcfast.models.sharding import is_sharded
from srcfast_kernels import swiglu
from srcfast_kernels.dropout import dropout_product
from srcfast_kernels.lora_linear import Adapted, Norm, lora_linears, swiglu_lora_linear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# Settings of PEFT's that change what an adapter computes, and the one value of each that is computed here.
UNDERSTOOD: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": [],
}


class LoRALinear(nn.Module):
    """A frozen linear with an adapter beside it; its number tells its dropout from that of the decoder's other linears."""

    def __init__(
        self, base: nn.Linear | NF4Linear, config: LoRAConfig, device: torch.device, dtype: torch.dtype, number: int = 0
    ) -> None:
        super().__init__()
        self.base: Any = base
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(config.r, base.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.r, **options))
        self.scaling = config.alpha / config.r
        self.dropout = config.dropout
        self.number = number
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self)[0]

    def adapted(self, dtype: torch.dtype) -> Adapted:
        """For `lora_linears`, the adapter in `dtype`."""
        a, b = self.lora_A.to(dtype), self.lora_B.to(dtype)
        return Adapted(self.base.weight, self.base.bias, a, b, self.scaling)


def project(
    x: Tensor, *linears: nn.Module, norm: nn.Module | None = None, keys: Tensor | None = None
) -> tuple[Tensor, ...]:
    """[T, out_i] of several linears of one input [T, in], after a norm where one is given; adapted ones together.

    `keys` are those of the rows' dropout, [T] int64; see `Decoder.dropout_keys`.
    """
    if not all(_is_adapted(one) for one in linears):
        x = x if norm is None else norm(x)
        return tuple(_alone(x, one, keys) for one in linears)
    if any(one.training and one.dropout for one in linears):  # of an input of its own each
        x = x if norm is None else norm(x)
        return tuple(_with_dropout(x, one, keys) for one in linears)
    adapted = [one.adapted(x.dtype) for one in linears]  # type: ignore[operator]
    if norm is None or norm.weight.requires_grad:  # type: ignore[union-attr]
        return lora_linears(x if norm is None else norm(x), adapted)
    return lora_linears(x, adapted, Norm(norm.weight, norm.eps))  # type: ignore[arg-type]


def _alone(x: Tensor, linear: nn.Module, keys: Tensor | None) -> Tensor:
    if not isinstance(linear, LoRALinear):
        return linear(x)
    return project(x, linear, keys=keys)[0] if linear.active else linear.base(x)


def project_swiglu(gate: Tensor, up: Tensor, linear: nn.Module, keys: Tensor | None = None) -> Tensor:
    """[T, out] of a linear of silu(gate) * up, [T, in] each; an adapted one keeps no product."""
    if _is_adapted(linear) and not (linear.training and linear.dropout):
        return swiglu_lora_linear(gate, up, linear.adapted(gate.dtype))  # type: ignore[operator]
    return project(swiglu(gate, up), linear, keys=keys)[0]


def _is_adapted(linear: nn.Module) -> bool:
    return isinstance(linear, LoRALinear) and linear.active


def _with_dropout(x: Tensor, linear: nn.Module, keys: Tensor | None) -> Tensor:
    if keys is None:
        raise SrcfastError(
            "lora.dropout: expected the rows' keys, from which it is told what to drop, found none. Mend: train with "
            "srcfast.training.loop, or set model.decoder.dropout_keys to [T] int64 before each forest"
        )
    own = linear.adapted(x.dtype)
    low = dropout_product(x, keys, linear.number, linear.dropout, own.lora_a)  # [T, r]
    return torch.addmm(linear.base(x), low, own.lora_b.T, alpha=own.scaling)


def apply_lora(model: nn.Module, lora: str | Path | LoRAConfig | None) -> None:
    """Give a model's decoder a new adapter (LoRAConfig), a saved one (directory), or none.

    Raises:
        InputError: see `load_adapter`.
    """
    if isinstance(lora, LoRAConfig):
        add_lora(model, lora)
    elif lora is not None:
        load_adapter(model, lora)


def refuse_idle_adapter(model: nn.Module, directory: str | Path) -> None:
    """Raises InputError where the adapter read from the directory changes nothing: the base's work would pass for its.

    Training may begin with one: as PEFT makes them, new adapters are such.
    """
    layers = adapters(model)
    if any(layer.scaling and layer.lora_A.any() and layer.lora_B.any() for layer in layers.values()):
        return
    raise InputError(
        file=Path(directory) / ADAPTER_WEIGHTS,
        field="lora_B",
        expected="an adapter that changes the model",
        found=f"{len(layers)} adapted layers whose lora_B @ lora_A is zero in all of them",
        mend="train the adapter first, or leave it out",
    )


def add_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Add a trainable adapter to the decoder's target layers; A is drawn as PEFT draws it, B is zero.

    Raises:
        InputError: no layer of that name, a rank below 1, or an adapter is there already.
    """
    refuse_adapter(model)
    embedding = model.decoder.embed_tokens.weight  # type: ignore[union-attr]
    exact = torch.promote_types(embedding.dtype, torch.float32)  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(config.seed)
    found = set()
    for number, (parent, name, linear) in enumerate(list(_linears(model.decoder))):
        if name not in config.target_modules:
            continue
        found.add(name)
        adapted = LoRALinear(linear, config, embedding.device, exact, number)
        bound = math.sqrt(3.0) / math.sqrt(3.0 * linear.in_features)  # kaiming_uniform_(a=sqrt(5)): 1 / sqrt(in)
        drawn = torch.rand(config.r, linear.in_features, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            adapted.lora_A.copy_((2.0 * drawn - 1.0) * bound)
        adapted.train(linear.training)
        setattr(parent, name, adapted)
    if missing := set(config.target_modules) - found:
        raise InputError(
            field="target_modules", expected=f"layers among {', '.join(TARGETS)}", found=", ".join(sorted(missing))
        )
    model.lora_config = config  # type: ignore[assignment]


def _linears(decoder: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for layer in decoder.layers:  # type: ignore[union-attr]
        for part in (layer.self_attn, layer.mlp):
            for name in TARGETS:
                if hasattr(part, name):
                    yield part, name, getattr(part, name)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by their name within the decoder."""
    return {name: part for name, part in model.decoder.named_modules() if isinstance(part, LoRALinear)}


def refuse_adapter(model: nn.Module) -> None:
    """Raises InputError where the model has an adapter."""
    if found := adapters(model):
        raise InputError(
            field=next(iter(found)),
            expected="a model without an adapter",
            found=f"{len(found)} adapted layers",
            mend="merge the adapter first (merge_lora)",
        )


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters."""
    return [parameter for layer in adapters(model).values() for parameter in (layer.lora_A, layer.lora_B)]


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """Within: the base model's outputs."""
    layers = adapters(model).values()
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


@contextmanager
def folded_lora(model: nn.Module) -> Iterator[None]:
    """Within: the same outputs from base weights that hold the adapter, for decoding, where its small products cost much.

    Weights of 16 or 4 bits are left as they are: folded, they would be rounded anew. So are weights that ranks share out.
    """
    whole = {} if is_sharded(model.decoder) else adapters(model)  # type: ignore[arg-type]
    layers = [layer for layer in whole.values() if isinstance(layer.base, nn.Linear) and layer.active]
    layers = [layer for layer in layers if layer.base.weight.dtype in (torch.float32, torch.float64)]
    kept = [layer.base.weight.data for layer in layers]
    for layer in layers:
        layer.base.weight.data = layer.base.weight.data + layer.scaling * (layer.lora_B.data @ layer.lora_A.data)
        layer.active = False
    try:
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.base.weight.data = weight
            layer.active = True


@torch.no_grad()
def merge_lora(model: nn.Module) -> int:
    """Add the adapter into the base weights and remove it; returns the number of merged matrices."""
    count = 0
    for name, layer in adapters(model).items():
        if not isinstance(layer.base, nn.Linear):
            raise InputError(field=name, expected="a base weight in 16 or 32 bits", found=type(layer.base).__name__)
        exact = torch.promote_types(layer.base.weight.dtype, torch.float32)
        change = layer.scaling * (layer.lora_B.to(exact) @ layer.lora_A.to(exact))
        layer.base.weight.copy_(layer.base.weight.to(exact) + change)
        path, _, last = name.rpartition(".")
        setattr(model.decoder.get_submodule(path), last, layer.base)  # type: ignore[union-attr,operator]
        count += 1
    return count


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT does, each atomically, the config last.

    Raises:
        InputError: the model has no adapter.
    """
    directory = Path(directory)
    layers = adapters(model)
    if not layers:
        raise InputError(file=directory, expected="a model with an adapter", found="none")
    config: LoRAConfig = model.lora_config  # type: ignore[assignment]
    prefix = _peft_prefix(model)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{prefix}.{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{prefix}.{name}.lora_B.weight"] = layer.lora_B
    save_tensors(directory / ADAPTER_WEIGHTS, tensors)
    # A pattern, not names: the vision tower has q_proj and the like, too, and must stay as it is.
    targets = "|".join(name for name in TARGETS if name in config.target_modules)
    scope = r".*language_model\..*" if ".language_model" in prefix else r".*\."
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.path),
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": rf"{scope}({targets})",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
    }
    write_json(directory / ADAPTER_CONFIG, settings)


def _peft_prefix(model: nn.Module) -> str:
    return "base_model.model.model.language_model" if hasattr(model, "vision") else "base_model.model.model"


def load_adapter(model: nn.Module, directory: str | Path, trainable: bool = True) -> None:
    """Read a PEFT LoRA adapter into a model that has none yet.

    Raises:
        InputError: a file is missing or damaged, or the adapter does not fit the model; the tensor is named.
    """
    directory = Path(directory)
    file = directory / ADAPTER_CONFIG
    try:
        settings = parse_object(regular(file).read_bytes())
        tensors = dict(read_file(directory / ADAPTER_WEIGHTS))
    except (OSError, ValueError, InputError) as error:
        if isinstance(error, InputError) and error.field is not None:
            raise  # it names the tensor
        raise InputError(
            file=directory, expected=f"an adapter: {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}", found=error
        ) from error
    for key, needed in UNDERSTOOD.items():
        if (settings.get(key) or needed) != needed:
            raise InputError(file=file, field=key, expected=str(needed), found=settings[key])
    rank: Any = settings.get("r")
    alpha: Any = settings.get("lora_alpha")
    dropout: Any = settings.get("lora_dropout", 0)
    for field, value, kinds, fits, expected in (
        ("r", rank, (int,), lambda r: 1 <= r <= 4096, "a rank, a whole number from 1 to 4096"),
        ("lora_alpha", alpha, (int, float), lambda a: 0 < a < 1e9, "a number above 0"),
        ("lora_dropout", dropout, (int, float), lambda share: 0 <= share < 1, "a share from 0 to below 1"),
    ):
        if type(value) not in kinds or not fits(value):
            raise InputError(file=file, field=field, expected=expected, found=repr(value))
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".lora_")
        position = name.find("layers.")
        if position < 0 or part not in ("A.weight", "B.weight"):
            raise InputError(
                file=directory / ADAPTER_WEIGHTS, field=key, expected="lora_A or lora_B of a decoder layer", found=key
            )
        if "vision_tower" in name:
            raise InputError(
                file=directory / ADAPTER_WEIGHTS, field=key, expected="layers of the decoder only", found=key
            )
        if tensor.dtype not in READ:
            raise InputError(
                file=directory / ADAPTER_WEIGHTS,
                field=key,
                expected="numbers in 16, 32 or 64 bits",
                found=str(tensor.dtype).removeprefix("torch."),
            )
        modules.setdefault(name[position:], {})[part[0]] = tensor
    if not modules:
        raise InputError(file=directory / ADAPTER_WEIGHTS, expected="an adapter's tensors", found="none")
    targets = tuple(sorted({name.rpartition(".")[2] for name in modules}))
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise InputError(
            file=directory / ADAPTER_WEIGHTS,
            field="target_modules",
            expected=f"layers among {', '.join(TARGETS)}",
            found=", ".join(unknown),
        )
    config = LoRAConfig.model_construct(r=rank, alpha=float(alpha), dropout=float(dropout), target_modules=targets)
    add_lora(model, config)
    layers = adapters(model)
    if missing := sorted(set(layers) ^ set(modules)):
        raise InputError(
            file=directory / ADAPTER_WEIGHTS,
            field=missing[0],
            expected="one adapter for each target layer of this model",
            found=f"{len(modules)} adapted layers, the model has {len(layers)}",
            mend="this adapter belongs to another base",
        )
    for name, layer in layers.items():
        for part, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
            tensor = modules[name].get(part)
            if tensor is None or tensor.shape != parameter.shape:
                raise InputError(
                    file=directory / ADAPTER_WEIGHTS,
                    field=f"{name}.lora_{part}",
                    expected=f"shape {list(parameter.shape)}",
                    found="none" if tensor is None else list(tensor.shape),
                    mend="this adapter belongs to another base",
                )
            with torch.no_grad():
                parameter.copy_(tensor)
            parameter.requires_grad_(trainable)


def adapter_hash(directory: str | Path) -> str:
    """SHA-256 over an adapter's weights and the settings that matter."""
    directory = Path(directory)
    try:
        settings = parse_object(regular(directory / ADAPTER_CONFIG).read_bytes())
        weights = regular(directory / ADAPTER_WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(
            file=directory, expected=f"an adapter: {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}", found=error
        ) from error
    kept = {key: settings.get(key) for key in ("r", "lora_alpha", "target_modules")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    digest.update(weights)
    return digest.hexdigest()
