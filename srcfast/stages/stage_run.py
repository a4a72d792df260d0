"""A training stage as a command of its own: what it shows, keeps and writes into its output directory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from srcfast import distributed
from srcfast.config.settings import Config, TrainingConfig
from srcfast.data.batching import num_steps
from srcfast.data.jsonl import write_json, write_jsonl
from srcfast.memory.forecast import Forecast
from srcfast.memory.measure import measured
from srcfast.memory.plan import forecast_items
from srcfast.run.directory import alone_in
from srcfast.run.progress import MetricsWriter, Track, peak_rss_bytes
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.training.loop import TrainingItem
from srcfast.training.profiler import StepProfiler


class TrainingRun:
    """A training stage's progress bar, `metrics.jsonl` and `summary.json`, with its memory as forecast and as measured.

    Only rank 0 writes. From its start until the summary is written no other process works in `output`; until then
    `checkpoint/` lies there, from which the same command continues.
    """

    def __init__(
        self,
        name: str,
        items: int,
        loop: TrainingConfig,
        output: Path,
        config: Config,
        model: nn.Module,
        profile: range | None = None,
    ) -> None:
        self.alone = ExitStack()
        self.alone.enter_context(alone_in(output))
        self.metrics_file = output / "metrics.jsonl"
        self.writer: MetricsWriter | None = None
        if distributed.is_main():
            self.metrics_file.unlink(missing_ok=True)
            self.writer = MetricsWriter(self.metrics_file)
        self.name, self.loop, self.output, self.config, self.model = name, loop, output, config, model
        self.history: list[dict[str, Any]] = []
        self.forecast: Forecast | None = None
        self.memory = ExitStack()
        self.taken = self.memory.enter_context(measured(config.model.device, model.parameters))
        self.progress = Track(name, num_steps(items, loop), "steps", config.quiet)
        self.profiler: StepProfiler | None = None
        if profile is not None and distributed.is_main():
            self.profiler = StepProfiler(profile, output / "profile")
        resolved = config.model_dump(mode="json")
        sections = ("seed", "model", "lora", "scorer", "curation", "scorer_training" if name == "scorer" else name)
        self.checkpoints = TrainingCheckpoints(
            output / "checkpoint",
            {key: resolved[key] for key in sections},
            config.checkpoint.minutes,
            config.checkpoint.steps,
            self.go_on,
        )

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(self, *error: object) -> None:
        self.memory.close()
        self.progress.close()
        if self.writer is not None:
            self.writer.close()
        if self.profiler is not None:
            self.profiler.show()
        if error[0] is not None:
            self.alone.close()

    def go_on(self, history: list[dict[str, Any]], seconds: float) -> None:
        """These steps were done before this process began: in the file they stand once, whatever it had of them."""
        self.history = list(history)
        if self.writer is not None:
            self.writer.close()
            write_jsonl(self.metrics_file, history)
            self.writer = MetricsWriter(self.metrics_file)
        self.progress.went_on(len(history), sum(metrics["tokens"] for metrics in history), seconds)

    def expect(self, items: Sequence[TrainingItem]) -> None:
        """Forecast the memory of training on these items."""
        self.forecast = forecast_items(self.config, self.name, [item.tree for item in items], self.loop)

    def step(self, metrics: dict[str, Any]) -> None:
        self.history.append(metrics)
        if self.writer is not None:
            self.writer.write(metrics)
        self.progress.advance(1, tokens=metrics["tokens"])

    def write_summary(self, **more: Any) -> None:
        """The training's result is on disk: with its summary it is over."""
        if not distributed.is_main():
            return
        summary = {
            **more,
            "steps": len(self.history),
            "tokens": self.progress.tokens,
            "seconds": self.progress.seconds,
            "tokens_per_second": self.progress.tokens_per_second,
            "peak_rss_bytes": peak_rss_bytes(),
            "first_step": self.history[0],
            "last_step": self.history[-1],
        }
        if self.forecast is not None:
            summary["memory"] = self.taken.record(self.forecast, [self.model])
        write_json(self.output / "summary.json", summary)
        self.checkpoints.remove()
        self.alone.close()
