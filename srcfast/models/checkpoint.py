"""Hugging Face directories, read by name from safetensors alone and written so that transformers reads them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from srcfast.errors import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_config(path: str | Path) -> Any:
    """The transformers config of a checkpoint directory. Raises InputError where there is none."""
    if not (Path(path) / "config.json").is_file():
        raise InputError(
            file=path, expected="a model directory with config.json", found="none", mend="name the directory"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(
            file=Path(path) / "config.json", expected="a config that transformers knows", found=error
        ) from error


def weight_files(path: str | Path) -> list[Path]:
    """The checkpoint's safetensors files, single or sharded. Raises InputError by name for anything else."""
    path = Path(path)
    if (path / INDEX).is_file():
        try:
            shards = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
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
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise InputError(file=file, expected="a whole safetensors file", found=error) from error


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy tensors into the module's parameters by name; every one must be there, fit, and be used.

    Raises:
        InputError: a tensor that is missing, unexpected or of another shape; it is named.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    persistent = set(module.state_dict())
    missing = sorted(name for name in persistent - set(tensors) if not name.endswith("position_ids"))
    unexpected = sorted(set(tensors) - set(own))
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise InputError(
                file=path,
                field=names[0],
                expected=f"no {kind} tensors",
                found=f"{len(names)} {kind}: {', '.join(names[:5])}",
                mend="the checkpoint does not fit its config.json",
            )
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise InputError(file=path, field=name, expected=f"shape {list(own[name].shape)}", found=list(tensor.shape))
        with torch.no_grad():
            own[name].copy_(tensor)


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"}
    )
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, file)


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
