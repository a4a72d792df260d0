"""What a tracker does, and how one that can't take values back logs each step once."""

from __future__ import annotations

import json
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from srcfast.data.jsonl import parse_object, replacing


class Tracker(Protocol):
    """A program that draws curves. Rank zero alone has one; every error that it raises ends its use, not the run."""

    def begin(self, stage: str, step: int) -> None:
        """Prepare for the steps of a stage from this one on, which an earlier attempt may have logged: none counts twice."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step, from 0; `begin` has been called for the stage."""

    def close(self, finished: bool) -> None:
        """Write what is not written yet. `finished`: the run has ended, and was not stopped."""


class LoggedSteps:
    """The run's id at a tracker and the last step of each stage that was logged there, in a file of the run.

    For trackers that take no step back: one that a stopped attempt has logged is not logged again.

    Attributes:
        run: id, the same in all attempts.
        continued: whether an earlier attempt has written the file.
        count: steps logged so far, over all stages and attempts.

    Args:
        file: `{"run": id, "count": steps, "steps": {stage: last step}}`; one that is missing or damaged begins a new run.
        at_once: write the file at each step, for a tracker that has a step on disk soon; else `save` alone writes it, and what a
            process had logged that was killed before counts as not logged.
    """

    def __init__(self, file: Path, at_once: bool = True) -> None:
        self._file, self._at_once = file, at_once
        self.run, self.count, self._steps = uuid.uuid4().hex, 0, dict[str, int]()
        self.continued = False
        try:
            stored = parse_object(file.read_bytes())
            run, count, steps = stored["run"], stored["count"], stored["steps"]
            if not (isinstance(run, str) and type(count) is int and isinstance(steps, dict)):
                raise ValueError(f"run = {run!r}, count = {count!r}, steps = {steps!r}")
            if not all(type(step) is int for step in steps.values()):
                raise ValueError(f"steps = {steps!r}")
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError) as error:
            text = f"{file}: expected the steps that were logged, found {error!r}: this tracker begins a new run"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            return
        self.run, self.count, self._steps, self.continued = run, count, steps, True

    def name_run(self, run: str) -> None:
        """Store an id that the tracker has given the run."""
        self.run = run
        self.save()

    def is_new(self, stage: str, step: int) -> bool:
        """Return whether this step of a stage, or a later one, has not been logged yet."""
        return step > self._steps.get(stage, -1)

    def add(self, stage: str, step: int) -> None:
        """Record a step as logged."""
        self._steps[stage] = step
        self.count += 1
        if self._at_once:
            self.save()

    def save(self) -> None:
        """Write the file."""
        # Not flushed to the disk: a power cut costs a step that is logged twice, and a flush would cost time at each step.
        with replacing(self._file, durable=False) as file:
            file.write(json.dumps({"run": self.run, "count": self.count, "steps": self._steps}).encode() + b"\n")
