"""Files are made as the umask says, and never through a link that someone planted under the name they are written to first."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from srcfast.config.settings import LoRAConfig
from srcfast.data.jsonl import write_json, write_jsonl, write_shards, write_text
from srcfast.models import load_lvlm
from srcfast.models.checkpoint import save_tensors
from srcfast.models.lora import save_adapter
from srcfast.models.lvlm import save_lvlm
from srcfast.run.directory import StageMetrics
from srcfast.training.checkpoint import SavedTraining, save_training


def write_metrics(path: Path) -> None:
    StageMetrics(path).write({"loss": 1.0})


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.txt": lambda path: write_text(path, "new"),
    "a.json": lambda path: write_json(path, {"a": "new"}),
    "a.jsonl": lambda path: write_jsonl(path, [{"a": "new"}]),
    "a.safetensors": lambda path: save_tensors(path, {"a": torch.zeros(3)}),
}


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(directory: Path) -> dict[str, int]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}


def test_every_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, umask: int, sound_model: Path) -> None:
    out = tmp_path / "out"
    for name, write in WRITERS.items():
        write(out / name)
        write(out / name)  # once more over the file that is there
    write_shards(out / "shards", [{"a": 1}])
    write_metrics(out / "metrics.jsonl")
    model = load_lvlm(sound_model)
    save_lvlm(model, out / "model")
    save_training(out / "checkpoint", SavedTraining(1, torch.ones(2), {"m": torch.ones(2)}, [], {}, 1.0))
    save_adapter(load_lvlm(sound_model, lora=LoRAConfig(r=2, alpha=32.0)), out / "adapter")
    found = modes(out)
    assert {"adapter_model.safetensors", "model.safetensors", "COMPLETE", "weights.safetensors"} <= set(found)
    assert set(found.values()) == {0o666 & ~umask}, found
    folders = {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_dir()}
    assert folders == {0o777 & ~umask}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_planted_under_the_temporary_name_is_not_followed(tmp_path: Path, name: str) -> None:
    target, out = tmp_path / "target", tmp_path / "out"
    target.write_text("kept")
    out.mkdir()
    os.symlink(target, out / f".{name}.{os.getpid()}.tmp")
    WRITERS[name](out / name)
    assert target.read_text() == "kept"
    assert [path.name for path in out.iterdir()] == [name] and not (out / name).is_symlink()


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_under_the_final_name_is_replaced_not_followed(tmp_path: Path, name: str) -> None:
    target, out = tmp_path / "target", tmp_path / "out"
    target.write_text("kept")
    out.mkdir()
    os.symlink(target, out / name)
    WRITERS[name](out / name)
    assert target.read_text() == "kept" and not (out / name).is_symlink()


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_killed_process_of_this_number_left_is_written_over(tmp_path: Path, name: str) -> None:
    left = tmp_path / f".{name}.{os.getpid()}.tmp"
    left.write_bytes(b"half" * 1000)
    left.chmod(0o400)
    WRITERS[name](tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert b"half" not in (tmp_path / name).read_bytes()
