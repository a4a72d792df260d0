"""Files that make a witness file when something runs what is in them."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

# What trainers, tokenizers, data loaders and optimizers of other projects read with pickle.
NAMES = (
    "pytorch_model.bin",
    "pytorch_model-00001-of-00001.bin",
    "adapter_model.bin",
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "random_states_0.pkl",
    "consolidated.00.pth",
    "mp_rank_00_model_states.pt",
    "model.pt",
    "model.pth",
    "model.ckpt",
    "last.ckpt",
    "model.pkl",
    "tokenizer.pkl",
    "vocab.pkl",
    "merges.pkl",
    "state.pkl",
    "features.npy",
    "sampler.joblib",
)


class Bomb:
    """Unpickled, it makes an empty file."""

    def __init__(self, witness: Path) -> None:
        self.witness = str(witness)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.witness, "w")


def bomb(name: str, witness: Path) -> bytes:
    """A bomb in the form that this name's usual reader expects: torch's archive, numpy's array, or a bare pickle."""
    buffer = io.BytesIO()
    if name.endswith(".npy"):
        np.save(buffer, np.array([Bomb(witness)], dtype=object), allow_pickle=True)
    elif name.endswith((".bin", ".pt", ".pth", ".ckpt")):
        torch.save({"weight": Bomb(witness)}, buffer)
    else:
        buffer.write(pickle.dumps(Bomb(witness)))
    return buffer.getvalue()


def plant(directories: Iterable[Path], witness: Path) -> None:
    """A bomb of each name in each directory."""
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            (directory / name).write_bytes(bomb(name, witness))


def plant_code(directory: Path, witness: Path) -> None:
    """Beside a checkpoint: Python files that make the witness when imported, named by auto_map in each of its configs."""
    code = f"open({str(witness)!r}, 'w').close()\n"
    for name in ("evil", "modeling_evil", "configuration_evil", "tokenization_evil", "image_processing_evil"):
        (directory / f"{name}.py").write_text(code)
    classes = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModel": "modeling_evil.EvilModel",
        "AutoModelForCausalLM": "modeling_evil.EvilModel",
        "AutoModelForImageTextToText": "modeling_evil.EvilModel",
        "AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"],
        "AutoImageProcessor": "image_processing_evil.EvilProcessor",
        "AutoProcessor": "evil.EvilProcessor",
    }
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        file = directory / name
        settings = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(settings | {"auto_map": classes, "trust_remote_code": True}))
