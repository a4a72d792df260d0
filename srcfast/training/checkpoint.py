"""Save a training and continue it: bit for bit on a CPU, and on a GPU with deterministic algorithms.

`checkpoint/step-NNNNNNNN/` holds `weights.safetensors` (the trained weights), `optimizer.safetensors` (their moments),
`state.json` (step, metrics so far, the training's identity, each file's SHA-256) and, written last, `COMPLETE` (the SHA-256 of
`state.json`). Nothing else changes while training: learning rate, order of items and dropout are functions of seed and step.

The directory is written under a temporary name, flushed and renamed. The last two are retained, so that damage to the newest
costs only the steps between them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from srcfast import distributed
from srcfast.data.jsonl import (
    COMPLETE,
    as_json,
    file_hash,
    flatten,
    image_print,
    parse_object,
    regular,
    replacing,
    temporary_of,
    write_json,
)
from srcfast.errors import ConfigError, SrcfastError
from srcfast.run import signals
from srcfast.training.items import TrainingItem
from srcfast.training.optimizer import AdamW

STATE, WEIGHTS, OPTIMIZER = "state.json", "weights.safetensors", "optimizer.safetensors"
NUM_RETAINED = 2  # checkpoints
_STATE_TYPES: Mapping[str, tuple[type, ...]] = {
    "step": (int,),
    "seconds": (float, int),
    "identity": (dict,),
    "sha256": (dict,),
    "history": (list,),
}
_NAME = re.compile(r"step-\d{8,}")
# The key of the items' hash as srcfast 0.1 computed it, over their classes' names. Its checkpoints are still accepted.
BEFORE = "items as srcfast 0.1 named them"
# Settings that change no number of a training, so that it may continue with other values, for instance after running out of
# memory.
_NUMERICALLY_NEUTRAL = ("loader_workers", "activation_checkpointing", "deterministic")


@dataclass
class TrainingCheckpoints:
    """Where and how often a training is saved.

    Args:
        directory: of its checkpoints, and of nothing else.
        settings: all that its numbers depend on beside what `train` is given, as JSON values. A checkpoint of other settings
            is refused.
        minutes: between two saves; 0: don't save by time.
        steps: between two saves; 0: don't save by step.
        on_continue: called with the metrics of the steps that are saved, and the seconds they took.
    """

    directory: Path
    settings: Mapping[str, Any]
    minutes: float = 10.0
    steps: int = 0
    on_continue: Callable[[list[dict[str, Any]], float], None] | None = None
    _identity: Mapping[str, Any] = field(default_factory=dict, init=False)
    _saved: int = field(default=0, init=False)
    _last: float = field(default_factory=time.monotonic, init=False)
    _began: float = field(default_factory=time.monotonic, init=False)

    def begin(
        self, optimizer: AdamW, loop: Mapping[str, Any], items: Sequence[TrainingItem]
    ) -> tuple[int, list[dict[str, Any]]]:
        """Load the newest checkpoint, if there is one, into the optimizer and its weights.

        All ranks load the one that rank 0 selects; their number may differ from that of the run that saved it. Rank 0 alone
        reads the images, to compute the training's identity.

        Args:
            optimizer: with the weights that the training starts from.
            loop: `TrainingConfig` as a dict.
            items: what is trained on.

        Returns:
            Steps done, and their metrics.

        Raises:
            ConfigError: the checkpoint is another training's, see `load_training`.
            InputError: an image can't be read.
        """
        saved: SavedTraining | None = None

        def search() -> int | None:
            nonlocal saved
            self._identity = identity_of(self.settings, loop, items, optimizer.weights)
            distributed.barrier_with_heartbeat()
            saved = load_training(self.directory, self._identity)
            self._identity = {key: value for key, value in self._identity.items() if key != BEFORE}
            return None if saved is None else saved.step

        if not distributed.is_rank_zero():
            distributed.barrier_with_heartbeat()  # without a timeout: rank 0 may read many images
        step = distributed.run_on_rank_zero(search)
        if step is None:
            return 0, []
        if saved is None:
            saved = _read(_step_directory(self.directory, step))
        with torch.no_grad():
            optimizer.weights.copy_(saved.weights)
        optimizer.load_state_dict(saved.optimizer)
        self._saved, self._began = step, time.monotonic() - saved.seconds
        if self.on_continue is not None:
            self.on_continue(saved.history, saved.seconds)
        return step, list(saved.history)

    def due(self, step: int) -> tuple[int, bool]:
        """Return the signal to stop by after this many steps (0: none), and whether to save; the same on all ranks."""
        by_time = self.minutes and time.monotonic() - self._last >= 60.0 * self.minutes
        by_step = self.steps and step % self.steps == 0
        per_rank = distributed.gather([signals.pending(), bool(by_time or by_step)])
        stop = max(signal for signal, _ in per_rank)
        _, rank_zero_saves = per_rank[0]  # the ranks' clocks may disagree
        return stop, bool(stop) or rank_zero_saves

    def save(self, step: int, optimizer: AdamW, history: list[dict[str, Any]]) -> None:
        """Save a step, on rank 0, unless it is saved already. All ranks have the same weights and moments.

        Raises:
            SrcfastError: the checkpoint can't be written.
        """
        if step != self._saved and distributed.is_rank_zero():
            seconds = time.monotonic() - self._began
            weights, moments = optimizer.weights, optimizer.state_dict()
            save_training(self.directory, SavedTraining(step, weights, moments, history, self._identity, seconds))
        self._saved, self._last = step, time.monotonic()


@dataclass
class SavedTraining:
    """A training between two steps.

    Attributes:
        step: updates done.
        weights: all trained weights, `[n]`.
        optimizer: as `AdamW.state_dict` returns it.
        history: metrics of each step done.
        identity: of the training, see `identity_of`.
        seconds: that the steps took.
    """

    step: int
    weights: Tensor
    optimizer: Mapping[str, Tensor]
    history: list[dict[str, Any]]
    identity: Mapping[str, Any]
    seconds: float


def identity_of(
    settings: Mapping[str, Any], loop: Mapping[str, Any], items: Sequence[TrainingItem], weights: Tensor
) -> dict[str, Any]:
    """Return what identifies a training: its settings, and hashes of its items and of the weights that it starts from.

    The directory of the images is not part of it, so that a stopped run can be moved together with its images and continued.

    Args:
        settings: of the stage.
        loop: `TrainingConfig` as a dict.
        items: what is trained on.
        weights: before the first step, `[n]`.

    Raises:
        InputError: an image can't be read.
    """
    print_of = cache(image_print)  # reads each file once
    digest, before = hashlib.sha256(), hashlib.sha256()
    for item in items:
        distributed.heartbeat()
        images = item.tree.images
        if item.images is not None:
            images = tuple(print_of(file, name) for file, name in zip(images, item.images, strict=True))
        for segment in item.tree.segments:
            before.update(np.array([segment.parent, segment.tokens.size]).tobytes() + segment.tokens.tobytes())
        before.update(repr((images, item.tree.key, item.meta)).encode())
        segments = [(segment.parent, segment.tokens) for segment in item.tree.segments]
        named = named_values([segments, images, item.tree.key, item.meta])
        digest.update(json.dumps(named, sort_keys=True).encode() + b"\n")
    return as_json(
        {
            "stage": settings,
            "loop": loop,
            "items": digest.hexdigest(),
            "starting weights": weights_hash(weights),
            BEFORE: before.hexdigest(),
        }
    )


def named_values(value: Any) -> Any:
    """Convert a value to JSON: dataclasses to their fields without the class's name, tensors and arrays to dtype, shape and hash.

    Raises:
        TypeError: a value of another type, whose text may differ between processes or releases.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_dataclass(value):
        return {field.name: named_values(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): named_values(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [named_values(inner) for inner in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), weights_hash(value)]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    raise TypeError(f"a training item's meta: expected numbers, text, tensors or dataclasses of these, found {value!r}")


def weights_hash(*weights: Tensor) -> str:
    """Return the SHA-256 of the tensors' bytes, one tensor after the other."""
    digest = hashlib.sha256()
    for tensor in weights:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_training(directory: Path, training: SavedTraining) -> None:
    """Write `step-NNNNNNNN/` atomically, and remove all checkpoints but the last two.

    Raises:
        SrcfastError: it can't be written.
    """
    final = _step_directory(directory, training.step)
    temporary = temporary_of(final)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_tensors(temporary / WEIGHTS, {"weights": training.weights})
        _write_tensors(temporary / OPTIMIZER, training.optimizer)
        state = {
            "step": training.step,
            "seconds": training.seconds,
            "identity": training.identity,
            "sha256": {name: file_hash(temporary / name) for name in (WEIGHTS, OPTIMIZER)},
            "history": training.history,
        }
        write_json(temporary / STATE, state)
        write_json(temporary / COMPLETE, {STATE: file_hash(temporary / STATE)})
        _sync_directory(temporary)
        if final.exists():  # it is damaged: else the training would have continued from it
            _remove(final)
        os.replace(temporary, final)
        _sync_directory(directory)
    except (OSError, SafetensorError) as error:
        raise SrcfastError(
            f"{final}: expected space and permission to save the training, found {error}. Fix: see to these; the same "
            "command then continues from the last save"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _checkpoints(directory)[:-NUM_RETAINED]:
        _remove(old)


def load_training(directory: Path, identity: Mapping[str, Any]) -> SavedTraining | None:
    """Load the newest undamaged checkpoint; None: there is none. A damaged one is skipped with a warning.

    Raises:
        ConfigError: it is another training's; the first setting that differs is named.
    """
    paths = _checkpoints(directory)
    for path in reversed(paths):
        try:
            training = _read(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            instead = "this training begins anew" if path == paths[0] else "the one before is used"
            warnings.warn(f"{path}: a damaged checkpoint ({error}): {instead}", RuntimeWarning, stacklevel=2)
            continue
        _check_same_training(path, training.identity, identity)
        return training
    return None


def _read(path: Path) -> SavedTraining:
    """Read a checkpoint. Raises OSError, ValueError, KeyError or SafetensorError if anything differs from what was written."""
    marker = parse_object(regular(path / COMPLETE).read_bytes())
    _check_hash(path / STATE, marker[STATE])
    state = parse_object((path / STATE).read_bytes())
    for name, types in _STATE_TYPES.items():
        if type(state[name]) not in types:
            raise ValueError(f"{STATE}, field {name!r}: expected {types[0].__name__}, found {state[name]!r}"[:200])
    if _step_directory(path.parent, state["step"]) != path:
        raise ValueError(f"{STATE}, field 'step': expected that of the folder's name, found {state['step']}")
    if not all(isinstance(row, dict) for row in state["history"]):
        raise ValueError(f"{STATE}, field 'history': expected a JSON object a step")
    for name in (WEIGHTS, OPTIMIZER):
        _check_hash(path / name, state["sha256"][name])
    return SavedTraining(
        step=state["step"],
        weights=load_file(path / WEIGHTS)["weights"],
        optimizer=load_file(path / OPTIMIZER),
        history=state["history"],
        identity=state["identity"],
        seconds=state["seconds"],
    )


def _check_hash(file: Path, expected: str) -> None:
    if (actual := file_hash(regular(file))) != expected:
        raise ValueError(f"{file.name}: expected SHA-256 {expected}, found {actual}")


def _check_same_training(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ConfigError if a checkpoint's identity differs from this training's in a setting that changes its numbers."""
    old, new = flatten(dict(stored)), flatten(dict(wanted))
    if old.get("items") == (hash_of_0_1 := new.pop(BEFORE, None)):  # saved by srcfast 0.1
        new["items"] = hash_of_0_1
    changed = [
        key for key in new | old if old.get(key) != new.get(key) and key.rpartition(".")[2] not in _NUMERICALLY_NEUTRAL
    ]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{path}: this checkpoint is of a training with {key} = {old.get(key)!r}, this run has {new.get(key)!r}. "
            f"Fix: set {key} back, take another name or output directory, or remove {path.parent} to begin anew"
        )


def _checkpoints(directory: Path) -> list[Path]:
    """List the checkpoints of a directory, oldest first."""
    if not directory.is_dir():
        return []
    paths = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    with replacing(file) as opened:
        opened.write(to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _step_directory(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def _remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a half-removed one is never read as a damaged checkpoint."""
    temporary = temporary_of(path.with_name(f"{path.name}.old"))
    os.replace(path, temporary)
    shutil.rmtree(temporary)


def _sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk, without which a rename may be lost in a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
