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
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from srcfast.data.jsonl import naming, parse_object, regular, remove_temporary, temporary_of
from srcfast.errors import InputError
from srcfast.models.quantized import NF4Linear
from srcfast.models.sharding import keep
from srcfast_kernels import NF4Weight, nf4_dequantize
from srcfast_kernels.nf4 import BLOCKSIZES, NESTED_BLOCKSIZE, nf4_from_state_dict

# Of any model that srcfast runs, with room to spare: what is beyond is a damaged config, not a larger model.
LARGEST = {
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 4096,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 28,
    "image_size": 1 << 14,
    "patch_size": 1 << 14,
}
WEIGHTS = "model.safetensors"
READ = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # others are quantised, or no weights
INDEX = "model.safetensors.index.json"


def read_config(path: str | Path) -> Any:
    """The transformers config of a checkpoint directory. Raises InputError where there is none."""
    if not os.path.isfile(Path(path) / "config.json"):
        raise InputError(
            file=path, expected="a model directory with config.json", found="none", mend="name the directory"
        )
    file = Path(path) / "config.json"
    try:
        told = parse_object(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(file=file, expected="a model's config in JSON", found=error) from error
    _check_sizes(told, "", file)
    for part in ("text_config", "vision_config"):
        _check_sizes(told.get(part), f"{part}.", file)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # its checks raise whatever they meet first: TypeError, KeyError, its own, ...
        found = f"{type(error).__name__}: {error}"
        raise InputError(file=file, expected="a config that transformers knows", found=found) from error


def _check_sizes(settings: Any, prefix: str, file: Path) -> None:
    """Before anything is allocated by them; what is not there has its default. Raises InputError naming the field."""
    if not isinstance(settings, dict):
        return
    for field in LARGEST.keys() & settings.keys():
        value, most = settings[field], LARGEST[field]
        if value is None and field in ("num_key_value_heads", "head_dim"):
            continue  # derived from the others
        if type(value) is not int or not 1 <= value <= most:
            expected = f"a whole number from 1 to {most:,}"
            raise InputError(file=file, field=prefix + field, expected=expected, found=repr(value))


def weight_files(path: str | Path) -> list[Path]:
    """The checkpoint's safetensors files, single or sharded. Raises InputError by name for anything else."""
    path = Path(path)
    if (path / INDEX).is_file():
        try:
            shards = sorted(set(parse_object((path / INDEX).read_bytes())["weight_map"].values()))
            if not shards or not all(isinstance(shard, str) and "\0" not in shard for shard in shards):
                raise ValueError(f"shards {shards}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                file=path / INDEX, field="weight_map", expected="tensor names and their shards, in JSON", found=error
            ) from error
        for shard in shards:
            if Path(shard).name != shard or not (path / shard).is_file():
                raise InputError(
                    file=path / INDEX, field="weight_map", expected="shards in this directory", found=shard
                )
        return [path / shard for shard in shards]
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    raise InputError(
        file=path,
        expected=f"{WEIGHTS} or {INDEX}",
        found=", ".join(pickled) or "no weights",
        mend="convert pickled weights with save_pretrained(safe_serialization=True); srcfast reads no pickle",
    )


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
            # The sum of what is finite may overflow, but no other sum is finite: one pass, at the speed of memory.
            if tensor.dtype in READ and not math.isfinite(tensor.sum()):
                odd = int((~tensor.isfinite()).sum())
                if odd:
                    raise InputError(
                        file=file,
                        field=name,
                        expected="finite numbers",
                        found=f"{odd:,} of {tensor.numel():,} that are NaN or infinite",
                        mend="fetch the file again",
                    )
            yield name, tensor


def stored_weights(path: str | Path, parts: Sequence[str] = ("",)) -> int:
    """How many weights a checkpoint's files hold in tensors whose names have one of `parts` in them; two in a byte of 4 bits.

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


def refuse_more_than_stored(modules: Iterable[nn.Module], path: str | Path, parts: Sequence[str] = ("",)) -> None:
    """Before memory is taken for them. Raises InputError where modules ask for more than twice what the files hold."""
    asked = sum(parameter.numel() for module in modules for parameter in module.parameters())
    stored = stored_weights(path, parts)
    if asked > 2 * stored:
        raise InputError(
            file=Path(path) / "config.json",
            expected=f"a model of the {stored:,} weights that its files hold",
            found=f"settings of one of {asked:,}",
            mend="the checkpoint does not fit its config.json",
        )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(regular(file), framework="pt") as tensors:
            with open(file, "rb") as opened:  # safetensors itself takes the last tensor of a name
                parse_object(opened.read(int.from_bytes(opened.read(8), "little")))
            yield tensors
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            file=file, expected="a whole safetensors file", found=error, mend="fetch the file again"
        ) from error


def fill(parts: Mapping[str, nn.Module], tensors: Iterable[tuple[str, str, Tensor]], path: str | Path) -> None:
    """Copy tensors (part, name, values) into the parts' parameters as they come; each must be there, fit, and be used.

    The weight of a 4-bit linear is quantised here. What bitsandbytes quantised is taken over, or dequantised for a whole weight.

    Raises:
        InputError: a tensor that is missing, unexpected or of another shape; it is named.
    """
    own, missing = {}, set()
    four_bits: dict[tuple[str, str], NF4Linear] = {}
    states: dict[tuple[str, str], dict[str, Tensor]] = {}
    for part, module in parts.items():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not name.endswith(".flat"):  # it is set by the weight's name alone
                own[part, name] = tensor
        linears = {name: linear for name, linear in module.named_modules() if isinstance(linear, NF4Linear)}
        four_bits |= {(part, f"{name}.weight"): linear for name, linear in linears.items()}
        missing |= {(part, name) for name in module.state_dict() if not name.endswith(("position_ids", ".flat"))}
    missing |= set(four_bits)
    unexpected, seen = [], set()
    for part, name, tensor in tensors:
        if (part, name) in seen:
            raise InputError(file=path, field=name, expected="each tensor once", found="a second one of this name")
        seen.add((part, name))
        weight, _, detail = name.partition(".weight.")
        place = (part, f"{weight}.weight") if detail else (part, name)
        missing.discard(place)
        if place not in own and place not in four_bits:
            unexpected.append(name)
        elif detail or tensor.dtype == torch.uint8:
            states.setdefault(place, {})[detail] = tensor
        else:
            linear = four_bits.get(place)
            shape = own[place].shape if linear is None else (linear.out_features, linear.in_features)
            _check_shape(path, name, shape, tensor.shape)
            if tensor.dtype not in READ and (linear is not None or own[place].is_floating_point()):
                expected, found = "float16, bfloat16, float32 or float64", str(tensor.dtype).removeprefix("torch.")
                raise InputError(file=path, field=name, expected=expected, found=found)
            _check_range(path, name, tensor, own[place].dtype if linear is None else _like(parts[part])[1])
            with torch.no_grad():
                if linear is None:
                    keep(own[place], tensor)
                else:
                    device, dtype = _like(parts[part])
                    linear.set_weight(tensor.to(device=device, dtype=dtype))
    for kind, names in (("missing", sorted(name for _, name in missing)), ("unexpected", sorted(unexpected))):
        if names:
            raise InputError(
                file=path,
                field=names[0],
                expected=f"no {kind} tensors",
                found=f"{len(names)} {kind}: {', '.join(names[:5])}",
                mend="the checkpoint does not fit its config.json",
            )
    for (part, name), state in states.items():
        device, dtype = _like(parts[part])
        try:
            quantised = nf4_from_state_dict({key: tensor.to(device) for key, tensor in state.items()})
            _check_nf4(quantised)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise InputError(
                file=path, field=name, expected="a weight in NF4 as bitsandbytes writes it", found=error
            ) from error
        linear = four_bits.get((part, name))
        shape = own[part, name].shape if linear is None else (linear.out_features, linear.in_features)
        _check_shape(path, name, shape, quantised.shape)
        with torch.no_grad():
            if linear is None:
                keep(own[part, name], nf4_dequantize(quantised))
                continue
            try:
                linear.set_quantized(replace(quantised, dtype=dtype))
            except ValueError as error:
                raise InputError(
                    file=path,
                    field=name,
                    expected="NF4 that ranks can share out",
                    found=error,
                    mend="distributed.shard=false, or quantise the checkpoint anew",
                ) from error


def _check_shape(path: str | Path, name: str, expected: Sequence[int], found: Sequence[int]) -> None:
    if tuple(expected) != tuple(found):
        raise InputError(file=path, field=name, expected=f"shape {list(expected)}", found=list(found))


def _check_range(path: str | Path, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises InputError where a number of a checkpoint is beyond all of the type that it is read into."""
    if not (dtype.is_floating_point and tensor.is_floating_point() and tensor.numel()):
        return
    limit = torch.finfo(dtype).max
    if limit < torch.finfo(tensor.dtype).max and (largest := max(abs(float(one)) for one in tensor.aminmax())) > limit:
        expected = f"numbers that {str(dtype).removeprefix('torch.')} holds, at most {limit:g}"
        mend = "load it in bfloat16 or float32, which hold larger ones"
        raise InputError(file=path, field=name, expected=expected, found=f"{largest:g}", mend=mend)


def _check_nf4(weight: NF4Weight) -> None:
    """Raises ValueError where codes and scales don't belong to each other: no kernel may read behind their ends."""
    if type(weight.blocksize) is not int or weight.blocksize not in BLOCKSIZES or weight.dtype not in READ:
        raise ValueError(f"blocks of {weight.blocksize!r} weights of {weight.dtype}")
    count, nested = math.prod(weight.shape), weight.nested_absmax
    blocks = math.ceil(count / weight.blocksize)
    wanted = [("codes", weight.packed, torch.uint8, math.ceil(count / 2))]
    wanted += [("absmax", weight.absmax, torch.float32 if nested is None else torch.uint8, blocks)]
    if nested is not None:
        wanted += [("nested_absmax", nested, torch.float32, math.ceil(blocks / NESTED_BLOCKSIZE))]
    for name, tensor, dtype, size in wanted:
        if tensor.dtype != dtype or tensor.numel() != size:
            raise ValueError(f"{name}: expected {size} of {dtype}, found {tensor.numel()} of {tensor.dtype}")
    if weight.offset is not None and not (weight.offset.numel() == 1 and math.isfinite(weight.offset)):
        raise ValueError(f"nested_offset: expected a finite number, found {weight.offset.tolist()}")


def _like(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module is, and what it computes in."""
    parameter = next(module.parameters())
    return parameter.device, parameter.dtype


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically. Raises OSError where it can't be written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own, for what safetensors writes first has a name by chance, which no one would know to be left over.
    temporary = temporary_of(file)
    written = temporary / file.name
    remove_temporary(temporary)  # never written through a link that is planted there
    try:
        with naming(file):
            temporary.mkdir()
            values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(values, written, metadata={"format": "pt"})
            # As the umask says: safetensors puts a file there that its owner alone may read.
            os.chmod(written, stat.S_IMODE(temporary.stat().st_mode) & 0o666)
            with open(written, "rb") as opened:
                os.fsync(opened.fileno())
            os.replace(written, file)
    except SafetensorError as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def model_hash(path: str | Path) -> str:
    """SHA-256 over a checkpoint's config and weights: the same content, the same hash, wherever it lies."""
    files = [Path(path) / "config.json", *weight_files(path)]
    return _digest(tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in files:
        with open(name, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
