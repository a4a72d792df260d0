"""A training on disk, so that it continues where it was stopped: on a CPU, and on a GPU that is deterministic, bit for bit.

`checkpoint/step-NNNNNNNN/` holds `weights.safetensors` (what is trained), `optimizer.safetensors` (its moments), `state.json`
(step, metrics so far, whose training it is, each file's SHA-256) and last `COMPLETE` (the SHA-256 of `state.json`). Nothing else
changes while training: the learning rate, the order of the items and what dropout drops are functions of seed and step.

The directory is written under a temporary name, flushed and renamed; the last two are kept, so that a damaged newest one costs
the steps between them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    parse_object,
    regular,
    replacing,
    temporary_of,
    write_json,
)
from srcfast.errors import ConfigError, InputError, SrcfastError
from srcfast.run import signals

if TYPE_CHECKING:
    from srcfast.training.loop import TrainingItem
    from srcfast.training.optimizer import AdamW

STATE, WEIGHTS, OPTIMIZER = "state.json", "weights.safetensors", "optimizer.safetensors"
KEPT = 2
_STATE: Mapping[str, tuple[type, ...]] = {
    "step": (int,),
    "seconds": (float, int),
    "identity": (dict,),
    "sha256": (dict,),
    "history": (list,),
}
_NAME = re.compile(r"step-\d{8,}")
# Settings that change no number of a training: it may continue with others, after running out of memory for instance.
# What names the items in checkpoints of srcfast 0.1: a hash that held their classes' names. These are still accepted.
BEFORE = "items as srcfast 0.1 named them"
_NO_MATTER = ("loader_workers", "activation_checkpointing", "deterministic")


@dataclass
class TrainingCheckpoints:
    """Where and how often a training is saved, and whose it is.

    Args:
        directory: of its checkpoints, and of nothing else.
        settings: all that its numbers depend on beside what `train` is given; what JSON can say. A checkpoint of other
            settings is refused.
        minutes: between two saves; 0: not by the clock.
        steps: between two saves; 0: not by their number.
        on_continue: called with the metrics of the steps that need not be done again, and the seconds they took.
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
        """Take over what is saved of the training that begins with these weights, items and settings of the loop.

        On several ranks all take what rank 0 finds whole; there may be another number of them than before. It alone reads the
        images, to name the training by them.

        Returns:
            Steps done, and their metrics.

        Raises:
            ConfigError: what is saved is another training's, see `load_training`.
            InputError: an image can't be read.
        """
        found: SavedTraining | None = None

        def search() -> int | None:
            nonlocal found
            self._identity = identity_of(self.settings, loop, items, optimizer.weights)
            distributed.barrier_with_heartbeat()
            found = load_training(self.directory, self._identity)
            self._identity = {key: value for key, value in self._identity.items() if key != BEFORE}
            return None if found is None else found.step

        if not distributed.is_rank_zero():
            distributed.barrier_with_heartbeat()  # however long rank 0 reads images
        step = distributed.run_on_rank_zero(search)
        if step is None:
            return 0, []
        if found is None:
            found = _read(_place(self.directory, step))
        with torch.no_grad():
            optimizer.weights.copy_(found.weights)
        optimizer.load_state_dict(found.optimizer)
        self._saved, self._began = step, time.monotonic() - found.seconds
        if self.on_continue is not None:
            self.on_continue(found.history, found.seconds)
        return step, list(found.history)

    def asked(self, step: int) -> tuple[int, bool]:
        """After this many steps: the signal to stop by (0: none), and whether to save; the same on all ranks."""
        by_clock = self.minutes and time.monotonic() - self._last >= 60.0 * self.minutes
        due = bool(by_clock or (self.steps and step % self.steps == 0))
        told = distributed.gather([signals.pending(), due])
        stop = max(signal for signal, _ in told)
        return stop, bool(stop) or told[0][1]

    def save(self, step: int, optimizer: AdamW, history: list[dict[str, Any]]) -> None:
        """Save unless that is done already. Rank 0 alone does it, for all ranks have the same.

        Raises:
            SrcfastError: it can't be written.
        """
        if step != self._saved and distributed.is_rank_zero():
            seconds = time.monotonic() - self._began
            weights, moments = optimizer.weights, optimizer.state_dict()
            save_training(self.directory, SavedTraining(step, weights, moments, history, self._identity, seconds))
        self._saved, self._last = step, time.monotonic()

    def remove(self) -> None:
        """Forget them all: the training's result is on disk."""
        if distributed.is_rank_zero():
            shutil.rmtree(self.directory, ignore_errors=True)


@dataclass
class SavedTraining:
    """A training between two steps.

    Attributes:
        step: updates done.
        weights: all that is trained, `[n]`.
        optimizer: as `AdamW.state_dict` gives it.
        history: metrics of each step done.
        identity: whose training it is, see `identity_of`.
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
    """What makes two trainings the same one: their settings, and hashes of their items and of the weights they start from.

    Not where their images lie: a run that was moved with its images, stopped in mid-training, goes on.

    Args:
        settings: of the stage.
        loop: `TrainingConfig` as a dict.
        items: what is trained on.
        weights: before the first step, `[n]`.

    Raises:
        InputError: an image can't be read.
    """
    print_of = cache(image_print)  # each file is read once
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
    """A value as JSON: dataclasses by their fields' names and not their own, tensors and arrays by dtype, shape and SHA-256.

    Raises:
        TypeError: a value of another kind, whose text may differ from one process or release to the next.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_dataclass(value):
        return {one.name: named_values(getattr(value, one.name)) for one in fields(value)}
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


def image_print(file: str | Path, name: str) -> str:
    """An image's name and SHA-256: the same when its folder is moved, another for another image. Raises InputError."""
    try:
        return f"{name} {file_hash(file)}"
    except OSError as error:
        found = error.strerror or error
        raise InputError(file=file, field="images", expected="a readable file", found=found) from error


def weights_hash(*weights: Tensor) -> str:
    """SHA-256 of the bits of one tensor after the other."""
    digest = hashlib.sha256()
    for tensor in weights:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_training(directory: Path, training: SavedTraining) -> None:
    """Write `step-NNNNNNNN/` whole or not at all, and drop all but the last two.

    Raises:
        SrcfastError: it can't be written.
    """
    final = _place(directory, training.step)
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
        _sync(temporary)
        if final.exists():  # damaged: else training would have continued from it
            _discard(final)
        os.replace(temporary, final)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        raise SrcfastError(
            f"{final}: expected room and permission to save the training, found {error}. Fix: see to these; the same "
            "command then continues from the last save"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _checkpoints(directory)[:-KEPT]:
        _discard(old)


def load_training(directory: Path, identity: Mapping[str, Any]) -> SavedTraining | None:
    """The newest whole checkpoint; None where there is none. A damaged one is passed over with a warning.

    Raises:
        ConfigError: it is another training's; the first setting that differs is named.
    """
    found = _checkpoints(directory)
    for path in reversed(found):
        try:
            training = _read(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            older = path != found[0]
            instead = "the one before is used" if older else "this training begins anew"
            warnings.warn(f"{path}: a damaged checkpoint ({error}): {instead}", RuntimeWarning, stacklevel=2)
            continue
        _check_same_training(path, training.identity, identity)
        return training
    return None


def _read(path: Path) -> SavedTraining:
    """Raises ValueError and the like where anything isn't as it was written."""
    marker = parse_object(regular(path / COMPLETE).read_bytes())
    _check_hash(path / STATE, marker[STATE])
    state = parse_object((path / STATE).read_bytes())
    for name, kind in _STATE.items():
        if type(state[name]) not in kind:
            raise ValueError(f"{STATE}, field {name!r}: expected {kind[0].__name__}, found {state[name]!r}"[:200])
    if _place(path.parent, state["step"]) != path:
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
    if (found := file_hash(regular(file))) != expected:
        raise ValueError(f"{file.name}: expected SHA-256 {expected}, found {found}")


def _check_same_training(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    old, new = flatten(dict(stored)), flatten(dict(wanted))
    if old.get("items") == (before := new.pop(BEFORE, None)):  # saved by srcfast 0.1
        new["items"] = before
    changed = [key for key in new | old if old.get(key) != new.get(key) and key.rpartition(".")[2] not in _NO_MATTER]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{path}: this checkpoint is of a training with {key} = {old.get(key)!r}, this run has {new.get(key)!r}. "
            f"Fix: set {key} back, take another name or output directory, or remove {path.parent} to begin anew"
        )


def _checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    if not directory.is_dir():
        return []
    found: Iterable[Path] = (path for path in directory.iterdir() if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    with replacing(file) as opened:
        opened.write(to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _place(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def _discard(path: Path) -> None:
    """Under another name first, so that no half of it is ever taken for a damaged checkpoint."""
    temporary = temporary_of(path.with_name(f"{path.name}.old"))
    os.replace(path, temporary)
    shutil.rmtree(temporary)


def _sync(directory: Path) -> None:
    """Names in a directory to disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
