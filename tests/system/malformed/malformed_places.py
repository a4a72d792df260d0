"""Whatever else may lie where a file or a folder is expected: pipes, devices, links in circles, paths that are none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from malformed_case import Case
from malformed_checkpoints import adapter, hash_adapter, lvlm, model, read_adapter, read_lvlm, read_model
from malformed_records import (
    easy_vqa,
    package,
    pairs,
    shards,
    teacher,
    write_rejected,
)
from malformed_runs import (
    ask_manifest,
    batch,
    load_checkpoint,
    page_of,
    read_page,
    replay_batch,
    run_with,
    training_with,
)

from srcfast.config.load import load_config
from srcfast.config.yaml import read_yaml
from srcfast.data.jsonl import COMPLETE
from srcfast.data.readers import read_logprob_rows, read_preferences
from srcfast.data.stage_rows import read_aligned, read_scores

Act = Callable[[Path], Any]


def pipe(path: Path) -> None:
    os.mkfifo(path)  # nobody writes: who opens it waits for ever


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")  # who reads it never comes to an end


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def folder(path: Path) -> None:
    path.mkdir()


def nowhere(path: Path) -> None:
    path.symlink_to("none")


ODD: dict[str, Callable[[Path], None]] = {
    "a pipe": pipe,
    "a device": device,
    "a link to itself": circle,
    "a link to nothing": nowhere,
    "a folder": folder,
}
FILES: dict[str, Act] = {
    "samples": write_rejected("jsonl"),
    "conversations": write_rejected("llava"),
    "messages": write_rejected("messages"),
    "a table": write_rejected("vlmeval_tsv"),
    "preferences": write_rejected("jsonl", read_preferences),
    "TRL preferences": write_rejected("trl", read_preferences),
    "preferences as messages": write_rejected("messages", read_preferences),
    "teacher rationales": teacher,
    "log-probabilities asked for": lambda path: read_logprob_rows(path, path.parent),
    "predictions": read_aligned,
    "settings": lambda path: load_config(path),
    "a vocabulary": lambda path: read_yaml(path, {}),
}
# Makes something sound; which of its files gives way; who reads it.
PARTS: dict[str, tuple[Callable[[Path], Path], str, Act]] = {
    "a model's config": (model({}), "config.json", read_model),
    "a model's weights": (model({}), "model.safetensors", read_model),
    "a model's tokenizer": (model({}), "tokenizer.json", read_model),
    "an image processor": (lvlm({}), "preprocessor_config.json", read_lvlm),
    "an adapter's settings": (adapter(), "adapter_config.json", read_adapter),
    "an adapter's weights": (adapter(), "adapter_model.safetensors", read_adapter),
    "an adapter's settings, hashed": (adapter(), "adapter_config.json", hash_adapter),
    "an adapter's weights, hashed": (adapter(), "adapter_model.safetensors", hash_adapter),
    "a shard": (shards("{}"), "00000.jsonl", pairs),
    "a shard's marker": (shards("{}"), COMPLETE, pairs),
    "the package's questions": (package("[]"), "", easy_vqa),
    "a finished stage's shard": (run_with(lambda run: None), "iteration-1/candidates/00000.jsonl", ask_manifest),
    "a training's marker": (training_with(lambda place: None), f"step-00000007/{COMPLETE}", load_checkpoint),
    "a training's state": (training_with(lambda place: None), "step-00000007/state.json", load_checkpoint),
    "a training's weights": (training_with(lambda place: None), "step-00000007/weights.safetensors", load_checkpoint),
    "a kept batch": (batch({}), "batch.json", replay_batch),
    "a run's summary": (page_of({}), "summary.json", read_page),
}
FOLDERS: dict[str, Act] = {
    "a model": read_model,
    "an LVLM": read_lvlm,
    "an adapter, hashed": hash_adapter,
    "shards": pairs,
    "scores": lambda path: list(read_scores(path)) and None,
    "a kept batch": replay_batch,
    "a run": read_page,
}
PATHS: dict[str, Callable[[Path], Path]] = {
    "nothing": lambda folder: folder / "none",
    "a file": lambda folder: _touched(folder / "a"),
    "a name of 300 letters": lambda folder: folder / ("a" * 300),
    "a path with a NUL": lambda folder: folder / "a\0b",
    "half of a surrogate pair": lambda folder: folder / "\ud800",
    "a link to itself": lambda folder: _linked(folder / "a"),
    "an empty folder": lambda folder: folder,
}


def _touched(path: Path) -> Path:
    path.touch()
    return path


def _linked(path: Path) -> Path:
    circle(path)
    return path


def _at(odd: Callable[[Path], None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        odd(folder / "file")
        return folder / "file"

    return make


def _within(sound: Callable[[Path], Path], name: str, odd: Callable[[Path], None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = sound(folder)
        file = path / name if name else path
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        odd(file)
        return path

    return make


def cases() -> list[Case]:
    """All of them."""
    found = [
        Case("In place of a file", f"{what}: {wrong}", _at(odd), act)
        for what, act in FILES.items()
        for wrong, odd in ODD.items()
    ]
    found += [
        Case("In place of a part", f"{what}: {wrong}", _within(make, name, odd), act)
        for what, (make, name, act) in PARTS.items()
        for wrong, odd in ODD.items()
    ]
    for wrong, make in PATHS.items():
        if wrong not in ("a file", "an empty folder", "a link to itself"):
            found += [Case("Paths of files", f"{what}: {wrong}", make, act) for what, act in FILES.items()]
        found += [Case("Paths of folders", f"{what}: {wrong}", make, act) for what, act in FOLDERS.items()]
    return found
