"""Hugging Face directories, read by name from safetensors alone and written so that transformers reads them."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from srcfast.data.jsonl import file_hash, json_hash, naming, parse_object, regular, remove_temporary, temporary_of
from srcfast.errors import InputError
from srcfast.models.config_bounds import check_files
from srcfast.models.quantized import NF4Linear
from srcfast.models.sharding import set_parameter
from srcfast_kernels import NF4Weight, nf4_dequantize
from srcfast_kernels.nf4 import BLOCKSIZES, NESTED_BLOCKSIZE, nf4_from_state_dict

WEIGHTS = "model.safetensors"
READ = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # others are quantised weights, or none
INDEX = "model.safetensors.index.json"
MISFIT = "the checkpoint does not fit its config.json"


def read_config(path: str | Path) -> Any:
    """Read the transformers config of a checkpoint directory.

    Raises:
        InputError: there is none, or a field of it, or of the tokenizer's and the processor's files, is out of bounds.
    """
    file = Path(path) / "config.json"
    if not os.path.isfile(file):
        raise _error(path, None, "a model directory with config.json", "none", "name the directory")
    check_files(Path(path))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # its checks raise TypeError, KeyError, classes of their own, ...
        raise _error(file, None, "a config that transformers knows", f"{type(error).__name__}: {error}") from error
    layers = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    chosen = getattr(config, "vision_feature_layer", None)  # 0: the embeddings, before the first layer
    if layers is not None and not all(-layers - 1 <= one <= layers for one in np.atleast_1d(chosen or [])):
        raise _error(file, "vision_feature_layer", f"layers from {-layers - 1} to {layers}", chosen)
    if config.model_type in ("llava", "llava_next"):  # whose images and patches are squares
        for name in ("image_size", "patch_size"):
            if type(side := getattr(config.vision_config, name, 1)) is not int:
                raise _error(file, f"vision_config.{name}", "a whole number", repr(side))
        grid = getattr(config, "image_grid_pinpoints", [(1, 1)])
        if not grid or any(not isinstance(size, list | tuple) or len(size) != 2 for size in grid):
            raise _error(file, "image_grid_pinpoints", "pairs of height and width", repr(grid))
    return config


def weight_files(path: str | Path) -> list[Path]:
    """List the checkpoint's safetensors files, single or sharded. Raises InputError by name for anything else."""
    path = Path(path)
    if (path / INDEX).is_file():
        return [path / shard for shard in _read_index(path / INDEX)]
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    fix = "convert pickled weights with save_pretrained(safe_serialization=True); srcfast reads no pickle"
    raise _error(path, None, f"{WEIGHTS} or {INDEX}", ", ".join(pickled) or "no weights", fix)


def _read_index(file: Path) -> list[str]:
    """Read the shards' names from an index. Raises InputError where it is damaged, or a shard is not beside it."""
    try:
        shards = sorted(set(parse_object(file.read_bytes())["weight_map"].values()))
        if not shards or not all(isinstance(shard, str) and "\0" not in shard for shard in shards):
            raise ValueError(f"shards {shards}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _error(file, "weight_map", "tensor names and their shards, in JSON", error) from error
    for shard in shards:
        if Path(shard).name != shard or not (file.parent / shard).is_file():
            raise _error(file, "weight_map", "shards in this directory", shard)
    return shards


def read_tensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) over all of a checkpoint's files."""
    for file in weight_files(path):
        yield from read_file(file)


def read_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of one safetensors file.

    Raises:
        InputError: it is damaged, holds a name twice, or a number that is not finite: the tensor is named.
    """
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
            tensor = tensors.get_tensor(name)
            check_finite(tensor, file, name)
            yield name, tensor


def check_finite(tensor: Tensor, file: Path, name: str) -> None:
    """Raise InputError, naming the tensor, where it holds a number that is NaN or infinite."""
    # Finite numbers may add up to infinity, but NaN and infinite ones never to a finite sum: one pass, as fast as memory.
    if tensor.dtype in READ and not math.isfinite(tensor.sum()) and (count := int((~tensor.isfinite()).sum())):
        found = f"{count:,} of {tensor.numel():,} that are NaN or infinite"
        raise _error(file, name, "finite numbers", found, "fetch the file again")


def stored_weights(path: str | Path, parts: Sequence[str] = ("",)) -> int:
    """Count the weights in tensors whose names contain one of `parts`; a byte of 4-bit codes holds two.

    Raises:
        InputError: as `read_file`.
    """
    count = 0
    for file in weight_files(path):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if any(part in name for part in parts):
                    stored = tensors.get_slice(name)
                    count += math.prod(stored.get_shape()) * (2 if stored.get_dtype() == "U8" else 1)
    return count


def stored_dtypes(path: str | Path) -> dict[str, torch.dtype]:
    """Return the types of a checkpoint's weights in 16 or 32 bits by name. Raises InputError as `read_file` does."""
    known = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    dtypes: dict[str, torch.dtype] = {}
    for file in weight_files(path):
        with _opened(file) as tensors:
            kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        dtypes |= {name: known[kind] for name, kind in kinds.items() if kind in known and ".weight." not in name}
    return dtypes


def check_weight_count(modules: Iterable[nn.Module], path: str | Path, parts: Sequence[str] = ("",)) -> None:
    """Raise InputError where modules would take memory for more than twice the weights that the files hold."""
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    stored = stored_weights(path, parts)
    if count > 2 * stored:
        expected, found = f"a model of the {stored:,} weights that its files hold", f"settings of one of {count:,}"
        raise _error(Path(path) / "config.json", None, expected, found, MISFIT)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises InputError where it is damaged, or what reads its tensors raises."""
    try:
        with safe_open(regular(file), framework="pt") as tensors:
            with open(file, "rb") as opened:  # safetensors itself takes the last tensor of a name
                parse_object(opened.read(int.from_bytes(opened.read(8), "little")))
            yield tensors
    except (OSError, ValueError, SafetensorError) as error:
        raise _error(file, None, "a whole safetensors file", error, "fetch the file again") from error


@dataclass(frozen=True)
class _Target:
    """What a checkpoint's tensor is copied to: `holder` is a parameter, a buffer, or a linear that quantises its weight."""

    holder: Tensor | NF4Linear
    shape: torch.Size  # of the whole weight, even where it is sharded
    dtype: torch.dtype
    device: torch.device
    required: bool


def fill(parts: Mapping[str, nn.Module], tensors: Iterable[tuple[str, str, Tensor]], path: str | Path) -> None:
    """Copy tensors (part, name, values) into the parts' parameters as they come, and check that each exists, fits and is used.

    The weight of a 4-bit linear is quantised here. A weight that bitsandbytes quantised is set as it is, or dequantised where
    the target is whole.

    Raises:
        InputError: a tensor that is missing, unexpected or of another shape; it is named.
    """
    targets = {(part, name): target for part, module in parts.items() for name, target in _targets(module).items()}
    missing = {key for key, target in targets.items() if target.required}
    quantised: dict[tuple[str, str], dict[str, Tensor]] = {}
    unexpected: list[str] = []
    seen: set[tuple[str, str]] = set()
    for part, name, tensor in tensors:
        if (part, name) in seen:
            raise _error(path, name, "each tensor once", "a second one of this name")
        seen.add((part, name))
        weight, _, detail = name.partition(".weight.")
        key = (part, f"{weight}.weight" if detail else name)
        missing.discard(key)
        if key not in targets:
            unexpected.append(name)
        elif detail or tensor.dtype == torch.uint8:
            quantised.setdefault(key, {})[detail] = tensor  # codes, scales and settings come one by one, in any order
        else:
            _check_tensor(targets[key], tensor, path, name)
            _set(targets[key], tensor)
    _check_none("missing", [name for _, name in missing], path)
    _check_none("unexpected", unexpected, path)
    for key, state in quantised.items():
        _set_nf4(targets[key], _read_nf4(targets[key], state, path, key[1]), path, key[1])


def _targets(module: nn.Module) -> dict[str, _Target]:
    """Map the names of a checkpoint's tensors to their targets in a module of one device and one dtype."""
    first, saved = next(module.parameters()), module.state_dict().keys()
    targets = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        required = name in saved and not name.endswith("position_ids")
        if not name.endswith(".flat"):  # a 4-bit linear's, which is set by its weight's name alone
            targets[name] = _Target(tensor, tensor.shape, tensor.dtype, first.device, required)
    for name, linear in module.named_modules():
        if isinstance(linear, NF4Linear):
            shape = torch.Size((linear.out_features, linear.in_features))
            targets[f"{name}.weight"] = _Target(linear, shape, first.dtype, first.device, required=True)
    return targets


@torch.no_grad()
def _set(target: _Target, tensor: Tensor) -> None:
    if isinstance(target.holder, NF4Linear):
        target.holder.set_weight(tensor.to(device=target.device, dtype=target.dtype))
    else:
        set_parameter(target.holder, tensor)


@torch.no_grad()
def _set_nf4(target: _Target, weight: NF4Weight, path: str | Path, name: str) -> None:
    """Set a target from a weight in 4 bits. Raises InputError where it can't be sharded."""
    if not isinstance(target.holder, NF4Linear):
        return set_parameter(target.holder, nf4_dequantize(weight))
    try:
        target.holder.set_quantized(replace(weight, dtype=target.dtype))
    except ValueError as error:
        fix = "distributed.shard=false, or quantise the checkpoint anew"
        raise _error(path, name, "NF4 that can be sharded over ranks", error, fix) from error


def _read_nf4(target: _Target, state: Mapping[str, Tensor], path: str | Path, name: str) -> NF4Weight:
    """Assemble a weight from the tensors that bitsandbytes wrote. Raises InputError where it is no NF4, or of another shape."""
    try:
        weight = nf4_from_state_dict({key: tensor.to(target.device) for key, tensor in state.items()})
        _check_nf4(weight)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise _error(path, name, "a weight in NF4 as bitsandbytes writes it", error) from error
    _check_shape(target, weight.shape, path, name)
    return weight


def _check_none(kind: str, names: list[str], path: str | Path) -> None:
    """Raise InputError where there are tensors of a kind: "missing" or "unexpected"."""
    if names := sorted(names):
        found = f"{len(names)} {kind}: {', '.join(names[:5])}"
        raise _error(path, names[0], f"no {kind} tensors", found, MISFIT)


def _check_shape(target: _Target, shape: torch.Size, path: str | Path, name: str) -> None:
    if target.shape != shape:
        raise _error(path, name, f"shape {list(target.shape)}", list(shape))


def _check_tensor(target: _Target, tensor: Tensor, path: str | Path, name: str) -> None:
    """Raise InputError where a tensor has another shape than its target, is no floats, or overflows the target's dtype."""
    _check_shape(target, tensor.shape, path, name)
    if not target.dtype.is_floating_point:
        return
    if tensor.dtype not in READ:
        raise _error(path, name, "float16, bfloat16, float32 or float64", str(tensor.dtype).removeprefix("torch."))
    limit = torch.finfo(target.dtype).max
    if tensor.numel() and limit < torch.finfo(tensor.dtype).max:
        if (largest := max(abs(float(extreme)) for extreme in tensor.aminmax())) > limit:
            expected = f"numbers that {str(target.dtype).removeprefix('torch.')} holds, at most {limit:g}"
            raise _error(path, name, expected, f"{largest:g}", "load it in bfloat16 or float32, which hold larger ones")


def _check_nf4(weight: NF4Weight) -> None:
    """Raise ValueError where codes and scales don't fit each other: kernels would read behind their ends."""
    if type(weight.blocksize) is not int or weight.blocksize not in BLOCKSIZES or weight.dtype not in READ:
        raise ValueError(f"blocks of {weight.blocksize!r} weights of {weight.dtype}")
    count, nested = math.prod(weight.shape), weight.nested_absmax
    blocks = math.ceil(count / weight.blocksize)
    layout = [("codes", weight.packed, torch.uint8, math.ceil(count / 2))]
    layout += [("absmax", weight.absmax, torch.float32 if nested is None else torch.uint8, blocks)]
    if nested is not None:
        layout += [("nested_absmax", nested, torch.float32, math.ceil(blocks / NESTED_BLOCKSIZE))]
    for name, tensor, dtype, size in layout:
        if tensor.dtype != dtype or tensor.numel() != size:
            raise ValueError(f"{name}: expected {size} of {dtype}, found {tensor.numel()} of {tensor.dtype}")
    if weight.offset is not None and not (weight.offset.numel() == 1 and math.isfinite(weight.offset)):
        raise ValueError(f"nested_offset: expected a finite number, found {weight.offset.tolist()}")


def _error(file: str | Path, field: str | None, expected: str, found: object, fix: str | None = None) -> InputError:
    return InputError(file=file, field=field, expected=expected, found=found, fix=fix)


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically. Raises OSError where it can't be written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # In a new directory: safetensors first writes under a random name, which no later run would recognise as a leftover.
    temporary = temporary_of(file)
    written = temporary / file.name
    remove_temporary(temporary)  # else a link planted there would be followed
    try:
        with naming_tensors(file):
            temporary.mkdir()
            values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(values, written, metadata={"format": "pt"})
            # By the umask: safetensors writes a file that its owner alone may read.
            os.chmod(written, stat.S_IMODE(temporary.stat().st_mode) & 0o666)
            with open(written, "rb") as opened:
                os.fsync(opened.fileno())
            os.replace(written, file)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def naming_tensors(path: Path) -> Iterator[None]:
    """Do what `naming` does, and turn safetensors' own error of the disk into the OSError that it was."""
    with naming(path):
        try:
            yield
        except SafetensorError as error:
            if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def model_hash(path: str | Path) -> str:
    """Hash a checkpoint's config and weights (SHA-256): the same content has the same hash in any directory."""
    files = [Path(path) / "config.json", *weight_files(path)]
    return _digest(tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


def companions(path: str | Path) -> list[Path]:
    """List a checkpoint's config, tokenizer, processor and template files: JSON, Jinja and text but the weights' index."""
    endings = (".json", ".jinja", ".txt", ".model")
    files = (file for file in sorted(Path(path).iterdir()) if file.suffix in endings and "safetensors" not in file.name)
    return [file for file in files if file.is_file()]


def checkpoint_hash(path: str | Path) -> str:
    """Hash a checkpoint's weights and companions: whatever of it decides results."""
    return f"{model_hash(path)} {json_hash({file.name: file_hash(file) for file in companions(path)})}"


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in files:
        with open(name, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
