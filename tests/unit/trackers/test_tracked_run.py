"""A calibration with a tracker: stopped, continued, and continued with one that is new to it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from srcfast.data.jsonl import read_jsonl
from srcfast.errors import Interrupted
from srcfast.trackers import tracking

SETTINGS = """
name: small
iterations: 0
quiet: true
model: {path: embedded}
data:
  train: [{name: world, format: world, split: train, limit: 16}]
  evaluation: [{name: world, format: world, split: test, limit: 4}]
lora: {r: 4, alpha: 8}
rationale: {samples: 16, epochs: 3, micro_batch_size: 8, gradient_accumulation_steps: 1}
evaluation: {max_new_tokens: 8, batch_size: 8, bootstrap_resamples: 100}
checkpoint: {minutes: 0, steps: 2}
"""


class Recorder:
    """A tracker that stops the run at a step of stage 1."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.calls, self.losses = stop_at, list[tuple[Any, ...]](), dict[int, float]()

    def begin(self, stage: str, step: int) -> None:
        self.calls.append(("begin", stage, step))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.calls.append((stage, step))
        if stage == "rationale":
            self.losses[step] = values["loss"]
            if step == self.stop_at:
                raise Interrupted(15)

    def close(self, finished: bool) -> None:
        self.calls.append(("close", finished))


@pytest.mark.slow
def test_a_run_logs_all_its_steps_and_results(
    srcfast: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SETTINGS, encoding="utf-8")
    monkeypatch.setattr(tracking, "IMPORTS", {"wandb": lambda directory: None})

    def run(recorder: Recorder, status: int) -> Recorder:
        monkeypatch.setattr(tracking, "BACKENDS", {"wandb": lambda directory, name, settings: recorder})
        done = srcfast("calibrate", config, f"output={tmp_path}", "trackers=[wandb]")
        assert done.exit_code == status, done.output
        return recorder

    base, steps = [("begin", "evaluation", 0), ("evaluation", 0)], [("rationale", step) for step in range(6)]
    stopped = run(Recorder(stop_at=3), 143)
    assert stopped.calls == [*base, ("begin", "rationale", 0), *steps[:4], ("close", False)]
    rest = [("begin", "rationale", 0), *steps, ("evaluation", 1), ("close", True)]
    again = run(Recorder(), 0)
    assert again.calls == [*base, *rest]
    rows = [row for _, row in read_jsonl(tmp_path / "small" / "metrics.jsonl")]
    assert [again.losses[row["step"]] for row in rows] == [row["loss"] for row in rows]
    assert run(Recorder(), 0).calls == [*base, *rest]  # of a run that is done: for a tracker that is new to it


def test_a_missing_tracker_is_refused_before_a_model_is_read(srcfast: Callable[..., Result], tmp_path: Path) -> None:
    words = ["model.path=none", f"output={tmp_path}", "trackers=[wandb]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        for command in ("calibrate", "rationale", "dpo", "scorer"):
            more = [] if command == "calibrate" else ["--data", tmp_path / "x.jsonl", "--output", tmp_path / "out"]
            refused = srcfast(command, *words, *more)
            assert refused.exit_code == 2 and "pip install 'srcfast[wandb]'" in refused.output, refused.output
