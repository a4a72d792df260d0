"""Files of a run cut short or with a bit flipped, and a disk, a directory or a clock that fails: told by name, or done again.

Never is damage used in silence: either the command ends with an error that names the file, or the run's files are those of the
undisturbed run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.small_run import STAGES, Server, assert_same, finished_stages


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[random.Random(file.name).randrange(len(data))] ^= 4
    file.write_bytes(data)


def stopped_at(server: Server, output: Path, stage: str) -> None:
    """A run is killed when this stage is about to be entered as finished: what it wrote is there."""
    before = STAGES.index(stage)
    seen = [f"os.rename manifest.json {count}" for count in range(1, before + 1)]
    points = {"only": "os.rename manifest.json", "seen": seen}
    assert server.run(output, {"kind": "kill", **points}).status == -signal.SIGKILL
    assert tuple(finished_stages(output / "small")) == STAGES[:before]


@pytest.fixture(scope="module")
def half_done(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run that was killed when its preference tuning was done and not yet entered; kept beside."""
    output = tmp_path_factory.mktemp("half") / "output"
    stopped_at(server, output, "iteration-1/dpo")
    shutil.copytree(output, output.with_name("kept"))
    return output


def damaged(output: Path, name: str, damage: Callable[[Path], None]) -> Path:
    """The half-done run as it was, but for one file; at the same path, for what is not finished belongs to its path."""
    shutil.rmtree(output)
    shutil.copytree(output.with_name("kept"), output)
    found = sorted((output / "small").glob(name))
    assert found, name
    damage(found[-1])
    return found[-1]


# In every stage that is finished: its file is named. What is of a stage that isn't, and what is made anew each time: done again.
NAMED = (
    "manifest.json",
    "rationale/adapter/adapter_model.safetensors",
    "rationale/adapter/adapter_config.json",
    "iteration-1/candidates/00000.jsonl",
    "iteration-1/candidates/COMPLETE",
    "iteration-1/scores/00000.jsonl",
    "iteration-1/preferences/00000.jsonl",
    "iteration-1/preferences/COMPLETE",
    "predictions/rationale/world-test.jsonl",
    "predictions/base/world-test.tsv",
)
DONE_AGAIN = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "iteration-1/adapter/adapter_model.safetensors",
    "checkpoint/iteration-1/dpo/step-*/weights.safetensors",
    "checkpoint/iteration-1/dpo/step-*/optimizer.safetensors",
    "checkpoint/iteration-1/dpo/step-*/state.json",
    "checkpoint/iteration-1/dpo/step-*/COMPLETE",
)


@pytest.mark.parametrize("damage", [pytest.param(cut, marks=pytest.mark.fault), flip])
@pytest.mark.parametrize("name", NAMED)
def test_a_damaged_file_of_a_finished_stage_is_named(
    server: Server, half_done: Path, name: str, damage: Callable[[Path], None]
) -> None:
    file = damaged(half_done, name, damage)
    attempt = server.run(half_done)
    assert attempt.status == 2, attempt.said
    assert str(file) in attempt.said.replace("\n", "") and "Traceback" not in attempt.said
    assert "Fix" in attempt.said


@pytest.mark.fault
@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("name", DONE_AGAIN)
def test_a_damaged_file_that_is_made_anew_changes_nothing(
    server: Server, half_done: Path, truth: dict[str, Any], name: str, damage: Callable[[Path], None]
) -> None:
    damaged(half_done, name, damage)
    attempt = server.run(half_done)
    assert attempt.status == 0, attempt.said
    if name.startswith("checkpoint"):
        assert "Warning" in attempt.said
    if name != "metrics.jsonl":  # a telemetry of steps long done: a damaged line of it is dropped
        assert_same(half_done / "small", truth)


@pytest.mark.parametrize(
    "stage",
    ["rationale", *(pytest.param(f"iteration-1/{stage}", marks=pytest.mark.fault) for stage in ("candidates", "dpo"))],
)
def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(
    server: Server, truth: dict[str, Any], tmp_path: Path, stage: str
) -> None:
    seen = [f"os.rename manifest.json {count}" for count in range(1, STAGES.index(stage))]
    attempt = server.run(tmp_path, {"kind": "full", "only": "os.rename manifest.json", "seen": seen})
    assert attempt.points and attempt.status not in (0, -signal.SIGKILL), attempt.said
    assert "No space left on device" in attempt.said
    assert "Traceback" not in attempt.said
    assert not list((tmp_path / "small").rglob(".*.tmp"))
    assert server.run(tmp_path).status == 0
    assert_same(tmp_path / "small", truth)


def test_a_clock_that_goes_backwards_changes_nothing(server: Server, truth: dict[str, Any], tmp_path: Path) -> None:
    attempt = server.run(tmp_path, {"kind": "backwards"})
    assert attempt.status == 0, attempt.said
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text(encoding="utf-8"))
    assert all(stage["seconds"] >= 0 for stage in manifest.values())
    assert_same(tmp_path / "small", truth)


def test_a_run_directory_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "small").write_text("a file is in the way", encoding="utf-8")
    attempt = server.run(tmp_path)
    assert attempt.status == 1 and str(tmp_path / "small") in attempt.said.replace("\n", ""), attempt.said
    assert "Fix" in attempt.said and "Traceback" not in attempt.said


def test_a_directory_that_becomes_read_only_is_told(server: Server, truth: dict[str, Any], tmp_path: Path) -> None:
    attempt = server.run(tmp_path, {"kind": "read-only", "only": "os.rename manifest.json"})
    assert attempt.points and attempt.status not in (0, -signal.SIGKILL), attempt.said
    assert "Read-only file system" in attempt.said and "Traceback" not in attempt.said
    assert server.run(tmp_path).status == 0
    assert_same(tmp_path / "small", truth)


def test_a_second_process_is_refused_while_the_first_works(
    server: Server, truth: dict[str, Any], tmp_path: Path
) -> None:
    attempt = server.run(tmp_path, {"kind": "twice", "only": "os.rename manifest.json"})
    assert attempt.status == 0, attempt.said
    assert "expected no other process to work here, found one (process" in attempt.said
    assert attempt.points[1:] == ["the second one ended with status 1"]
    assert_same(tmp_path / "small", truth)
