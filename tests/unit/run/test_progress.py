"""Progress by a clock that is set: seconds, rates and the time that is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from srcfast.run import progress
from srcfast.run.progress import StageProgress, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_what_is_left_follows_from_what_was_done(clock: list[float]) -> None:
    stage = StageProgress("candidates", 100, quiet=True)
    assert stage.line() == "candidates 0/100 samples, 0.0 samples/s"
    clock[0] += 10.0
    stage.advance(20, tokens=5000)
    assert stage.line() == "candidates 20/100 samples, 2.0 samples/s, 500 tokens/s, 0:00:40 left"
    stage.set_total(60)
    assert stage.line().endswith("0:00:20 left")
    clock[0] += 10.0
    stage.advance(40)
    stage.close()
    clock[0] += 1e6
    assert (stage.done, stage.tokens, stage.seconds, stage.tokens_per_second) == (60, 5000, 20.0, 250.0)
    assert stage.line() == "candidates 60/60 samples, 3.0 samples/s, 250 tokens/s, took 0:00:20"


def test_a_stage_that_goes_on_counts_what_was_done_before(clock: list[float]) -> None:
    told = []
    stage = StageProgress("scores", 100, quiet=True)
    stage.on_advance = lambda: told.append(stage.done)
    stage.resume(30, 600, 15.0)
    clock[0] += 5.0
    stage.advance(10, tokens=200)
    assert (stage.done, stage.tokens, stage.seconds, stage.tokens_per_second) == (40, 800, 20.0, 40.0)
    assert stage.line() == "scores 40/100 samples, 2.0 samples/s, 40 tokens/s, 0:00:30 left"
    assert told == [30, 40]


def test_the_progress_file_is_written_at_most_once_a_second(clock: list[float], tmp_path: Path) -> None:
    file = tmp_path / "checkpoint" / "progress.json"

    def written() -> tuple[int, int, float]:
        row = json.loads(file.read_text(encoding="utf-8"))
        assert (row["stage"], row["unit"], row["tokens"]) == ("dpo", "steps", 3 * row["done"])
        return row["done"], row["total"], row["seconds"]

    stage = StageProgress("dpo", 9, "steps", quiet=True, file=file)
    assert written() == (0, 9, 0.0)
    clock[0] += 0.75
    stage.advance(1, tokens=3)
    assert written() == (0, 9, 0.0)
    clock[0] += 0.25
    stage.advance(1, tokens=3)
    assert written() == (2, 9, 1.0)
    stage.advance(1, tokens=3)
    stage.close()
    assert written() == (3, 9, 1.0)


def test_a_progress_file_that_can_t_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "b").mkdir()
    for file in (tmp_path / "a" / "progress.json", tmp_path / "b"):
        with track("dpo", 1, quiet=True, file=file) as stage:
            stage.advance()
        assert stage.done == 1
