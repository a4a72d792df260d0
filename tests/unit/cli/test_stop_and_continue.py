"""A training command that is stopped goes on; two processes never work in one directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.made_rows import preference_rows, write_rows
from safetensors.torch import load_file

from srcfast.errors import SrcfastError
from srcfast.run.directory import RunDirectory, StageMetrics
from srcfast.run.lock import exclusive_lock
from srcfast.stages import policy
from srcfast.training import loop
from srcfast.training.loader import PackedStep
from srcfast.training.step import StepNumbers

Srcfast = Callable[..., Result]
STEPS = 6  # 6 pairs, one a step


@pytest.fixture
def words(model_dir: Path, image_root: Path, tmp_path: Path) -> list[str]:
    """A small DPO training but for its output."""
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows(6, seed=1))
    files = ["--model", str(model_dir), "--data", str(data), "--image-root", str(image_root)]
    return ["dpo", *files, "--quiet", "lora.r=4", "micro_batch_size=1", "gradient_accumulation_steps=1", "threads=1"]


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def assert_whole(output: Path, expected: dict[str, torch.Tensor]) -> None:
    """The adapter to the bit, every step's metrics once, and nothing left of the way there."""
    found = adapter_of(output)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert json.loads((output / "summary.json").read_text())["steps"] == STEPS
    assert not (output / "checkpoint").exists() and not list(output.rglob(".*.tmp"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_a_training_after_its_step_and_the_same_command_continues(
    srcfast: Srcfast, words: list[str], tmp_path: Path, workers: int
) -> None:
    assert srcfast(*words, "--output", tmp_path / "whole").exit_code == 0
    output = tmp_path / "stopped"
    command = [*words, "--output", str(output), f"loader_workers={workers}"]
    words = [sys.executable, "-m", "srcfast", *command]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    file = output / "metrics.jsonl"
    while process.poll() is None and not (file.is_file() and file.stat().st_size):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)  # its worker processes, too, as a terminal or a scheduler does
    _, told = process.communicate(timeout=600)
    if process.returncode:  # it may have been at its end when the signal came
        assert process.returncode == 128 + signal.SIGTERM
        assert "stopped by SIGTERM after step" in told and "The same command continues" in told
        assert list((output / "checkpoint").glob("step-*/COMPLETE"))
    with open(file, "a", encoding="utf-8") as metrics:
        metrics.write('{"step": 99}\n{"step": 1')  # of steps that weren't saved, the last one half-written
    assert srcfast(*command).exit_code == 0
    assert_whole(output, adapter_of(tmp_path / "whole"))


KILLED_IN_STEP_3 = """
import os, signal, sys
from srcfast.cli.app import app
from srcfast.stages import policy
from srcfast.training import loop

accumulate = loop.accumulate

def killed(model, step, *more):
    if step.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return accumulate(model, step, *more)

loop.accumulate = killed
app(sys.argv[1:])
"""


def test_after_kill_9_a_training_goes_on_from_the_last_save(
    srcfast: Srcfast, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert srcfast(*words, "--output", tmp_path / "whole").exit_code == 0
    output = tmp_path / "killed"
    command = [*words, "--output", str(output), "checkpoint.steps=2"]
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_STEP_3, *command], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (output / "checkpoint").glob("step-*")] == ["step-00000002"]
    (output / "checkpoint" / ".step-00000004.1234.tmp").mkdir()
    (output / ".metrics.jsonl.1234.tmp").touch()
    begun, accumulate = [], loop.accumulate

    def noted(model: object, step: PackedStep, *more: Any) -> StepNumbers:
        begun.append(step.step)
        return accumulate(model, step, *more)

    monkeypatch.setattr(loop, "accumulate", noted)
    assert srcfast(*command).exit_code == 0
    assert begun == [2, 3, 4, 5]
    assert_whole(output, adapter_of(tmp_path / "whole"))


def test_a_stop_between_the_last_step_and_the_result_costs_no_step(
    srcfast: Srcfast, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert srcfast(*words, "--output", tmp_path / "whole").exit_code == 0
    command = [*words, "--output", str(tmp_path / "stopped"), "checkpoint.minutes=0"]
    with monkeypatch.context() as patched:
        patched.setattr(policy, "save_adapter", lambda *arguments: signal.raise_signal(signal.SIGTERM))
        assert srcfast(*command).exit_code == 128 + signal.SIGTERM
    with monkeypatch.context() as patched:
        patched.setattr(loop, "accumulate", lambda *arguments: pytest.fail("a step was done again"))
        assert srcfast(*command).exit_code == 0
    assert_whole(tmp_path / "stopped", adapter_of(tmp_path / "whole"))


HOLD = """
import sys, time
from pathlib import Path
from srcfast.run.lock import exclusive_lock
with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_in_a_directory_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with (
            pytest.raises(SrcfastError, match=rf"expected no other process.*process {first.pid} on .*Fix"),
            exclusive_lock(tmp_path),
        ):
            pass
    finally:
        first.kill()
        first.communicate()
    with exclusive_lock(tmp_path):
        pass


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "rationale" / ".step-00000003.old.77.tmp").mkdir(parents=True)
    (tmp_path / "rationale" / ".00000.jsonl.123.tmp").touch()
    kept = [tmp_path / ".notes.tmp", tmp_path / "rationale" / "adapter.123.tmp", tmp_path / "manifest.json"]
    for file in kept:
        file.touch()
    with exclusive_lock(tmp_path, whole=True):
        pass
    assert sorted(tmp_path.rglob("*")) == sorted([*kept, tmp_path / "rationale", tmp_path / ".lock"])


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "run"
    with (
        pytest.raises(SrcfastError, match="file/run: expected a directory that can be written.*Fix"),
        exclusive_lock(place),
    ):
        pass


def test_metrics_of_a_stage_are_put_in_the_place_of_what_it_left(tmp_path: Path) -> None:
    file = RunDirectory(tmp_path).metrics_file
    rows = [
        {"stage": "rationale", "step": 0},
        {"stage": "iteration-1/dpo", "step": 0},
        {"stage": "iteration-1/dpo", "step": 1},
    ]
    for row in rows:
        StageMetrics(file, row["stage"]).write({"step": row["step"]})
    StageMetrics(file, "iteration-1/dpo").restart([{"step": 0}])
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows[:2]
