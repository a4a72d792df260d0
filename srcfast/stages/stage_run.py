"""Run one stage: its chunks and checkpoints, its metrics, its progress, its memory as forecast and as measured.

`calibrate` runs its stages in one run directory (`CalibrationRun.stage`); a command runs one stage in its output directory
(`command_stage`). The stages take a `StageRun` and do not see which of the two it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from srcfast import distributed
from srcfast.config.settings import Config, TrainingConfig
from srcfast.data.jsonl import write_json
from srcfast.memory.forecast import Forecast
from srcfast.memory.measure import Measurement, measured
from srcfast.memory.plan import forecast_items
from srcfast.models.protocols import HasDecoder
from srcfast.models.scorer import Scorer
from srcfast.run.chunks import Chunks, remove_chunks
from srcfast.run.directory import StageMetrics
from srcfast.run.lock import exclusive_lock
from srcfast.run.progress import StageProgress, peak_rss_bytes, track
from srcfast.stages.nonfinite import dump_nonfinite_batch
from srcfast.stages.stage_inputs import InputRecord
from srcfast.trackers.tracking import Trackers, tracking
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.training.items import Metrics, TrainingItem
from srcfast.training.profiler import StepProfiler


class Hooks(TypedDict):
    """The keyword arguments that each training of the stages takes: its callbacks, profiler and checkpoints."""

    on_step: Callable[[Metrics], None]
    on_items: Callable[[Sequence[TrainingItem]], None]
    profiler: StepProfiler | None
    checkpoints: TrainingCheckpoints


@dataclass
class StageRun:
    """The surroundings of a stage's work.

    Attributes:
        name: in a run, `KIND` or `iteration-K/KIND`; with a command the kind.
        kind: which stage, as forecasts name it: rationale, candidates, scores, preferences, dpo, evaluation, headroom, scorer.
        config: of the run.
        output: the run's directory, or the command's.
        checkpoint_dir: of chunks and training checkpoints; used by this stage alone, removed once its result is on disk.
        settings: those that the result depends on.
        progress: of the stage.
        metrics: of the training's steps.
        trackers: to which the steps are logged, too.
        profile_dir: where steps are profiled to.
        profile: the steps to profile.
        forecast: of the memory; a training replaces the typical one by that of its items.
        inputs: returns hashes of what the stage reads, by name; called on rank 0.
        history: the training's metrics, step by step.
        result: what a command's `summary.json` says beside the training's figures.
    """

    name: str
    kind: str
    config: Config
    output: Path
    checkpoint_dir: Path
    settings: Mapping[str, Any]
    progress: StageProgress
    metrics: StageMetrics
    trackers: Trackers
    profile_dir: Path
    profile: range | None = None
    forecast: Forecast | None = None
    inputs: Callable[[], Mapping[str, str]] = dict
    history: list[Metrics] = field(default_factory=list)
    result: dict[str, Any] | None = None

    def chunks(self, name: str = "", **depends_on: Callable[[], Any]) -> Chunks:
        """Return where this stage stores chunks: in `name` below its checkpoint directory.

        Args:
            name: one for each list of items of the stage.
            depends_on: functions that compute what the chunks depend on beside settings and items, such as hashes of weights;
                called when chunks are compared with those on disk.
        """

        def values() -> dict[str, Any]:
            return {
                **self.settings,
                "inputs": dict(self.inputs()),
                **{key: value() for key, value in depends_on.items()},
            }

        return Chunks(self.checkpoint_dir / name, values, self.progress)

    @contextmanager
    def training(self, model: HasDecoder | Scorer, records: Sequence[Any], loop: TrainingConfig) -> Iterator[Hooks]:
        """Yield the hooks of the training that the body runs; record its metrics, checkpoints, profile and memory.

        Args:
            model: what is trained.
            records: the training's items are made of these records, one each, in their order.
            loop: the training's settings.

        Raises:
            SrcfastError: a loss or gradient is not finite; the batch is stored, see `nonfinite`.
        """
        profiler = None
        if self.profile is not None and distributed.is_rank_zero():
            profiler = StepProfiler(self.profile, self.profile_dir)
        hooks = Hooks(
            on_step=self._on_step,
            on_items=partial(self._on_items, loop),
            profiler=profiler,
            checkpoints=TrainingCheckpoints(
                self.checkpoint_dir,
                self.settings,
                self.config.checkpoint.minutes,
                self.config.checkpoint.steps,
                self._on_continue,
            ),
        )
        try:
            with dump_nonfinite_batch(self.kind, self.config, model, records, loop, self.output):
                yield hooks
        finally:
            if profiler is not None:
                profiler.show()

    def _on_step(self, metrics: Metrics) -> None:
        """Record one step."""
        # Nothing was continued: only now is it certain that a stopped attempt's rows are of no use.
        if not self.history:
            self.metrics.restart()
        self.history.append(metrics)
        self.metrics.write(metrics)
        self.trackers.log(self.name, metrics["step"], metrics)
        self.progress.advance(1, tokens=metrics["tokens"])

    def _on_items(self, loop: TrainingConfig, items: Sequence[TrainingItem]) -> None:
        """Replace the forecast of typical items by that of the actual ones."""
        self.forecast = forecast_items(self.config, self.kind, [item.tree for item in items], loop)

    def _on_continue(self, history: list[Metrics], seconds: float) -> None:
        """Restore the metrics and the progress of the steps that a stopped process has done, in so many seconds."""
        self.history = list(history)
        self.metrics.restart(history)
        for metrics in history:  # a tracker may lack some of them
            self.trackers.log(self.name, metrics["step"], metrics)
            distributed.heartbeat()
        self.progress.resume(len(history), sum(metrics["tokens"] for metrics in history), seconds)


@dataclass(kw_only=True)
class CommandStage(StageRun):
    """A stage that is a whole command.

    Attributes:
        measurement: of its memory.
        timing: ends the measurement and the progress bar when it is closed.
    """

    measurement: Measurement
    timing: ExitStack

    def stop_timing(self) -> None:
        """End the progress bar and the measurement of memory; what follows is not counted as the stage's."""
        self.timing.close()

    def write_summary(self, models: Sequence[nn.Module]) -> None:
        """Write `summary.json` of a training: the result and what its steps took."""
        summary = {
            **(self.result or {}),
            "steps": len(self.history),
            "tokens": self.progress.tokens,
            "seconds": self.progress.seconds,
            "tokens_per_second": self.progress.tokens_per_second,
            "peak_rss_bytes": peak_rss_bytes(),
            "first_step": self.history[0],
            "last_step": self.history[-1],
        }
        if self.forecast is not None:
            summary["memory"] = self.measurement.record(self.forecast, models)
        write_json(self.output / "summary.json", summary)


@contextmanager
def command_stage(
    kind: str,
    config: Config,
    output: Path,
    total: int,
    unit: str = "samples",
    *,
    sections: Sequence[str],
    models: Callable[[], Sequence[nn.Module]],
    profile: range | None = None,
    inputs: Callable[[], Mapping[str, str]] = dict,
    tracked: bool = False,
) -> Iterator[CommandStage]:
    """Run one stage as a command, alone in its output directory; the same command continues one that was stopped.

    When the body has ended without an error, a training's `summary.json` is written and the chunks and checkpoints are removed.

    Args:
        kind: names the progress bar, and a training's forecast: see `StageRun`.
        config: settings.
        output: the command's directory.
        total: units to do.
        unit: what is counted.
        sections: settings that the result depends on, beside seed and model.
        models: returns the models in memory, whose memory is measured.
        profile: steps of a training to profile.
        inputs: see `StageRun`.
        tracked: log the steps to the trackers of the settings.
    """
    resolved = config.identity()
    log = tracking(config, output) if tracked else nullcontext(Trackers({}))
    with exclusive_lock(output), log as trackers, ExitStack() as timing:
        measurement = timing.enter_context(
            measured(config.model.device, lambda: [p for model in models() for p in model.parameters()])
        )
        stage = CommandStage(
            name=kind,
            kind=kind,
            config=config,
            output=output,
            checkpoint_dir=output / "checkpoint",
            settings={key: resolved[key] for key in ("seed", "model", *sections)},
            progress=timing.enter_context(track(kind, total, unit, quiet=config.quiet)),
            metrics=StageMetrics(output / "metrics.jsonl"),
            trackers=trackers,
            profile_dir=output / "profile",
            profile=profile,
            inputs=inputs,
            measurement=measurement,
            timing=timing,
        )
        yield stage
        timing.close()
        if stage.result is not None and distributed.is_rank_zero():
            stage.write_summary(models())
        remove_chunks(stage.checkpoint_dir)


def sampling_stage(
    name: str, config: Config, output: Path, total: int, sections: Sequence[str], made_of: InputRecord
) -> AbstractContextManager[CommandStage]:
    """Open the stage of a command that runs a model over the samples of `made_of`."""
    return command_stage(name, config, output, total, sections=sections, models=list, inputs=made_of.all)


def training_stage(
    name: str,
    config: Config,
    output: Path,
    steps: int,
    models: Callable[[], Sequence[nn.Module]],
    profile: range | None,
) -> AbstractContextManager[CommandStage]:
    """Open the stage of a command that trains a model."""
    sections = ("lora", "scorer", "curation", "scorer_training" if name == "scorer" else name)
    return command_stage(
        name, config, output, steps, "steps", sections=sections, models=models, profile=profile, tracked=True
    )
