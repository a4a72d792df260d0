"""Log a run's numbers to the trackers that its settings name, on rank zero.

`metrics.jsonl` and the manifest stay what counts: nothing is read back from a tracker, and one that fails is left out with a
warning, while the run goes on.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from srcfast import distributed
from srcfast.config.settings import Config
from srcfast.data.jsonl import flatten
from srcfast.errors import ConfigError
from srcfast.run.directory import iteration_of
from srcfast.trackers.backends import MLflow, TensorBoard, Trackio, WandB, import_trackio
from srcfast.trackers.protocol import Tracker

FOLDER = "trackers"
IMPORTS: Mapping[str, Callable[[Path], Any]] = {
    "tensorboard": lambda directory: import_module("torch.utils.tensorboard"),
    "wandb": lambda directory: import_module("wandb"),
    "trackio": import_trackio,
    "mlflow": lambda directory: import_module("mlflow"),
}
BACKENDS: Mapping[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}
# What stages other than evaluations and headroom return for the manifest.
RESULTS = ("diversity", "calibration", "adaptive", "funnel", "references")
# Read when the packages are imported. They would report their use to their makers; and a server that does not answer would be
# waited for longer than the ranks wait for each other.
ENVIRONMENT = {
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "GRADIO_ANALYTICS_ENABLED": "False",
}


class Trackers:
    """The trackers of a run; none on ranks other than zero.

    Args:
        trackers: by name.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)
        self._begun: set[tuple[str, str]] = set()  # (tracker, stage)

    def log(self, stage: str, step: int, numbers: Mapping[str, Any]) -> None:
        """Log a step of a stage.

        Args:
            stage: such as `iteration-1/dpo`.
            step: of the stage, from 0; the first that is logged in this process is the one that the stage continues from.
            numbers: values by name, nested or not; what is no finite number is left out.
        """
        values = {name: value for name, value in numbers_of(numbers).items() if name != "step"}
        if not values:
            return
        for name, tracker in list(self._trackers.items()):
            with self._leave_out_failed(name):
                if (name, stage) not in self._begun:
                    tracker.begin(stage, step)
                    self._begun.add((name, stage))
                tracker.log(stage, step, values)

    def __bool__(self) -> bool:
        """Return whether there is a tracker."""
        return bool(self._trackers)

    def close(self, finished: bool) -> None:
        """Close all trackers; see `Tracker.close`."""
        for name, tracker in list(self._trackers.items()):
            with self._leave_out_failed(name):
                tracker.close(finished)

    @contextmanager
    def _leave_out_failed(self, name: str) -> Iterator[None]:
        """Warn of an error of the body, and use this tracker no more."""
        try:
            yield
        except Exception as error:  # as a foreign library, it may raise anything
            del self._trackers[name]
            _warn(name, error)


def _warn(name: str, error: Exception) -> None:
    text = f"tracker {name}: {type(error).__name__}: {error}. The run goes on without it; metrics.jsonl has all numbers"
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def check_installed(config: Config, directory: Path) -> None:
    """Import on rank 0 what `config.trackers` need, before anything heavy is read.

    Raises:
        ConfigError: a package is missing or can't be imported; the error has the command that installs it.
    """
    if config.trackers:
        distributed.run_on_rank_zero(lambda: _import_all(config.trackers, directory / FOLDER))


def _import_all(names: Sequence[str], directory: Path) -> None:
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    for name in names:
        try:
            IMPORTS[name](directory)
        except ValueError as error:  # it can be imported, but not for this folder
            _warn(name, error)
        except Exception as error:  # as a foreign library, it may raise anything
            raise ConfigError(
                f"trackers: expected {name}, which can be imported, found {type(error).__name__}: {error}. "
                f"Fix: pip install 'srcfast[{name}]', or take {name} out of trackers"
            ) from error


@contextmanager
def tracking(config: Config, directory: Path) -> Iterator[Trackers]:
    """Yield the trackers of a run that `config.trackers` names; close them at the end of the body.

    Args:
        config: of the run.
        directory: of the run or the command; what trackers write is in its `trackers/`.
    """
    opened: dict[str, Tracker] = {}
    for name in config.trackers if distributed.is_rank_zero() else ():
        try:
            with redirect_stdout(sys.stderr):  # what they say is no output of the command
                opened[name] = BACKENDS[name](directory / FOLDER, config.name, flatten(config.model_dump(mode="json")))
        except Exception as error:  # such as a server that does not answer
            _warn(name, error)
    trackers = Trackers(opened)
    finished = False
    try:
        yield trackers
        finished = True
    finally:
        with redirect_stdout(sys.stderr):
            trackers.close(finished)


def numbers_of(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers among nested values, by names joined with slashes."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            numbers |= numbers_of(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            numbers[f"{prefix}{key}"] = value
    return numbers


def results_of(name: str, result: Mapping[str, Any]) -> tuple[str, int, dict[str, float]]:
    """Return as what a finished stage of a calibration is logged: a name, a step, and its numbers.

    Results of one kind make a curve over the rounds: evaluations of the base, of stage 1 and of round K are steps 0, 1 and K + 1
    of `evaluation`; what else a round K gives is step K of `headroom`, `candidates`, `scores` or `preferences`. A training has
    no numbers here, as its steps were logged.

    Args:
        name: of the stage.
        result: what it returned for the manifest, or its entry there.
    """
    of, _, kind = name.rpartition("/")
    number = iteration_of(name)
    if kind in ("evaluation", "headroom"):
        step = number if kind == "headroom" else {"base": 0, "rationale": 1}.get(of, number + 1)
        sets = {
            f"{entry['dataset']}-{entry['split']}": {
                key: value for key, value in entry.items() if key not in ("iteration", "by_ability", "by_category")
            }
            for entry in result["entries"]
        }
        return kind, step, numbers_of(sets)
    return kind, number, numbers_of({key: result[key] for key in RESULTS if key in result})
