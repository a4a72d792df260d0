"""The trackers: each is imported when it is made, writes below the run's directory, and sends nothing unless the user's
environment names a server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srcfast.trackers.protocol import LoggedSteps

PROJECT = "srcfast"
MLFLOW_BATCH = 100  # parameters that one request of MLflow may have
MLFLOW_VALUE = 6000  # characters of a parameter


def _prefixed(stage: str, step: int, values: Mapping[str, float]) -> dict[str, float]:
    """Return the values of a stage's step under names that begin with the stage's, and the step among them."""
    return {f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step}


class TensorBoard:
    """Event files in `trackers/tensorboard/STAGE/`: each stage is a run of TensorBoard's, whose steps count from 0.

    Args:
        directory: of the run's trackers.
        name, settings: of the run; not used, as event files have neither.
    """

    def __init__(self, directory: Path, name: str, settings: Mapping[str, Any]) -> None:
        self._directory = directory / "tensorboard"
        self._stage = ""
        self._writer: Any = None

    def begin(self, stage: str, step: int) -> None:
        """Open the stage's event file, which takes back what earlier files have from this step on."""
        self._open(stage, step)

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Write a step, at once: a process that is killed afterwards has lost nothing."""
        if stage != self._stage:
            self._open(stage, None)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, stage: str, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close(finished=True)
        self._writer, self._stage = SummaryWriter(self._directory / stage, purge_step=purge_step), stage


class WandB:
    """A run of Weights & Biases, in `trackers/wandb/`: offline unless WANDB_MODE says otherwise.

    Args:
        directory: of the run's trackers.
        name: of the run.
        settings: of the run.
    """

    def __init__(self, directory: Path, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        # W&B buffers what it writes: a process that is killed loses it.
        self._logged = LoggedSteps(directory / "wandb.json", at_once=False)
        directory.mkdir(parents=True, exist_ok=True)
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=self._logged.run,
            resume=None if mode == "offline" else "allow",  # nothing to ask offline, where it only warns
            dir=directory,
            config=dict(settings),
            mode=mode,
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True),
        )
        self._logged.name_run(self._run.id)

    def begin(self, stage: str, step: int) -> None:
        """Have the stage's values drawn over the steps of the stage."""
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Log a step, unless an earlier attempt did. The step of W&B itself counts over all stages: it may not fall."""
        if self._logged.is_new(stage, step):
            self._run.log(_prefixed(stage, step, values), step=self._logged.count, commit=True)
            self._logged.add(stage, step)

    def close(self, finished: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=0 if finished else 1)
        self._logged.save()


def import_trackio(directory: Path) -> Any:
    """Import trackio, whose folder is then `trackio` below the trackers' directory unless TRACKIO_DIR says otherwise.

    Raises:
        ImportError: it is missing.
        ValueError: it was imported for another run: it reads its folder once a process.
    """
    is_default = "TRACKIO_DIR" not in os.environ
    folder = Path(os.environ.setdefault("TRACKIO_DIR", str((directory / "trackio").absolute())))
    try:
        import trackio
        from trackio.utils import TRACKIO_DIR
    finally:
        if is_default:
            del os.environ["TRACKIO_DIR"]
    if Path(TRACKIO_DIR) != folder:
        fix = "Fix: set TRACKIO_DIR to one folder for all runs"
        raise ValueError(f"expected trackio to write to {folder}, found {TRACKIO_DIR}, as for the run before. {fix}")
    return trackio


class Trackio:
    """A run of trackio, in `trackers/trackio/` unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say otherwise.

    Args:
        directory: of the run's trackers.
        name: of the run.
        settings: of the run.

    Raises:
        ValueError: see `import_trackio`.
    """

    def __init__(self, directory: Path, name: str, settings: Mapping[str, Any]) -> None:
        trackio = import_trackio(directory)
        self._logged = LoggedSteps(directory / "trackio.json")
        self._trackio = trackio
        self._run = trackio.init(
            project=PROJECT,
            name=name,
            config=dict(settings),
            resume="allow" if self._logged.continued else "never",
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._logged.name_run(str(self._run.id))

    def begin(self, stage: str, step: int) -> None:
        """Do nothing: trackio has no stages."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Log a step, unless an earlier attempt did. The step of trackio itself counts over all stages."""
        if self._logged.is_new(stage, step):
            self._run.log(_prefixed(stage, step, values), step=self._logged.count)
            self._logged.add(stage, step)

    def close(self, finished: bool) -> None:
        """Write what is queued."""
        self._trackio.finish()


class MLflow:
    """A run of MLflow, in `trackers/mlflow.db` unless MLFLOW_TRACKING_URI says otherwise.

    Args:
        directory: of the run's trackers.
        name: of the run.
        settings: of the run, its parameters by dotted names.
    """

    def __init__(self, directory: Path, name: str, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        directory.mkdir(parents=True, exist_ok=True)
        self._metric, self._logged = Metric, LoggedSteps(directory / "mlflow.json")
        local = "MLFLOW_TRACKING_URI" not in os.environ
        address = f"sqlite:///{directory.absolute()}/mlflow.db" if local else os.environ["MLFLOW_TRACKING_URI"]
        self._client = MlflowClient(tracking_uri=address)
        if self._logged.continued:
            self._client.update_run(self._logged.run, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(experiment)
        artifacts = str(directory.absolute() / "mlflow-artifacts") if local else None
        number = self._client.create_experiment(experiment, artifacts) if known is None else known.experiment_id
        self._logged.name_run(self._client.create_run(number, run_name=name).info.run_id)
        params = [Param(key, str(value)[:MLFLOW_VALUE]) for key, value in settings.items()]
        for begin in range(0, len(params), MLFLOW_BATCH):
            self._client.log_batch(self._logged.run, params=params[begin : begin + MLFLOW_BATCH])

    def begin(self, stage: str, step: int) -> None:
        """Do nothing: MLflow's metrics each have steps."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Log a step, unless an earlier attempt did."""
        if self._logged.is_new(stage, step):
            now = int(1000 * time.time())
            # Other characters than these are refused in a name.
            named = {re.sub(r"[^\w\-. /]", "_", f"{stage}/{name}"): value for name, value in values.items()}
            metrics = [self._metric(name, value, now, step) for name, value in named.items()]
            self._client.log_batch(self._logged.run, metrics=metrics)
            self._logged.add(stage, step)

    def close(self, finished: bool) -> None:
        """Mark the run as finished or stopped."""
        self._client.set_terminated(self._logged.run, "FINISHED" if finished else "KILLED")
