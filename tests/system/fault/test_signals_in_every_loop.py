"""A signal in any loop of a calibration is obeyed at the loop's next boundary, and what was done until there isn't done again."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_run import SETTINGS, STAGES
from typer.testing import CliRunner

from srcfast.cli.app import app
from srcfast.run import chunks
from srcfast.run.directory import RunDirectory
from srcfast.stages import candidates, evaluation, logprobs, scoring
from srcfast.training.checkpoint import TrainingCheckpoints

# At least two pieces in each stage that works in pieces, and saves of a training by no clock and no count.
FINE = ["candidates.batch_size=1", "evaluation.batch_size=1", "checkpoint.minutes=0", "checkpoint.steps=0"]


class Strikes:
    """Sends one signal to each stage, in the midst of its first piece or step; counts what is done."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = run
        self.struck: dict[str, signal.Signals] = {}
        self.written, self.stepped = Counter[Path](), Counter[tuple[str, int]]()
        write, due = chunks._write, TrainingCheckpoints.due

        def strike_and_write(file: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
            self.written[file] += 1
            self.strike(file)
            write(file, head, rows)

        def strike_and_ask(checkpoints: TrainingCheckpoints, step: int) -> tuple[int, bool]:
            self.stepped[str(checkpoints.directory), step] += 1
            self.strike(checkpoints.directory)
            return due(checkpoints, step)

        monkeypatch.setattr(chunks, "_write", strike_and_write)
        monkeypatch.setattr(TrainingCheckpoints, "due", strike_and_ask)

    def strike(self, place: Path) -> None:
        stage = max(
            (stage for stage in STAGES if place.is_relative_to(RunDirectory(self.run).checkpoint(stage))), key=len
        )
        if stage not in self.struck:
            self.struck[stage] = (signal.SIGTERM, signal.SIGINT)[len(self.struck) % 2]
            signal.raise_signal(self.struck[stage])


@pytest.mark.slow
def test_in_every_loop_a_signal_saves_at_the_next_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (candidates, evaluation):
        monkeypatch.setattr(module, "BATCHES", 1)
    monkeypatch.setattr(scoring, "CHUNK", 4)
    monkeypatch.setattr(logprobs, "PAIRS", 2)
    torch.set_num_threads(1)
    config, run = tmp_path / "small.yaml", tmp_path / "small"
    config.write_text(SETTINGS, encoding="utf-8")
    strikes = Strikes(run, monkeypatch)
    for stage in STAGES:
        result = CliRunner().invoke(app, ["calibrate", str(config), f"output={tmp_path}", *FINE])
        number = strikes.struck[stage]
        assert result.exit_code == 128 + number, result.output
        done = re.search(
            rf"stopped by {number.name} after (chunk|step) 1 of (\d+)\. The same command continues", result.output
        )
        assert done is not None and int(done[2]) > 1, result.output
        kept = "step-00000001/COMPLETE" if done[1] == "step" else "**/00000.jsonl"
        assert list(RunDirectory(run).checkpoint(stage).glob(kept))
    result = CliRunner().invoke(app, ["calibrate", str(config), f"output={tmp_path}", *FINE])
    assert result.exit_code == 0, result.output
    assert tuple(strikes.struck) == STAGES == tuple(json.loads((run / "manifest.json").read_text(encoding="utf-8")))
    assert set(strikes.written.values()) == set(strikes.stepped.values()) == {1}, "no piece and no step was done twice"
