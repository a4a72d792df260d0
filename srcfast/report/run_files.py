"""Read the files of a run directory that the page shows; most are optional."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srcfast.config.yaml import read_yaml
from srcfast.data.jsonl import parse_json, parse_object, regular
from srcfast.errors import InputError
from srcfast.report.manifest_summary import summary_of
from srcfast.report.shapes import Card, FinishedStage, Progress, Settings, Step, Summary, check_shape
from srcfast.run.metric_rows import check_metrics
from srcfast.run.progress import PROGRESS_FILE
from srcfast.run.stage_names import planned_stages


@dataclass(frozen=True)
class RunFiles:
    """A run's results; those of stages that have not run yet are empty.

    Attributes:
        path: of the run.
        summary: as `summary.json` has it, or as the finished stages give it.
        metrics: one entry per training step; `stage` names the training.
        gallery, config, environment: as in their files.
        finished: names of the finished stages.
        remaining: names of the stages that have not finished, in order.
        progress: of the stage that is under way or was stopped, as `progress.json` has it; None: there is none.
    """

    path: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    gallery: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]
    finished: list[str] = field(default_factory=list)
    remaining: list[str] = field(default_factory=list)
    progress: dict[str, Any] | None = None

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The summary's evaluations, in the order in which they ran."""
        return self.summary.get("evaluations", [])

    @property
    def models(self) -> list[str]:
        """The evaluated models, in order: base, rationale, iteration-1, ..."""
        return list(dict.fromkeys(row["model"] for row in self.evaluations))

    @property
    def splits(self) -> list[tuple[str, str]]:
        """(dataset, split) of the evaluations, in order."""
        return list(dict.fromkeys((row["dataset"], row["split"]) for row in self.evaluations))

    def evaluation(self, model: str, dataset: str, split: str) -> dict[str, Any] | None:
        """Return the evaluation of a model on a split, or None."""
        key = (model, dataset, split)
        matches = (row for row in self.evaluations if (row["model"], row["dataset"], row["split"]) == key)
        return next(matches, None)

    def training(self, stage: str) -> list[dict[str, Any]]:
        """Return the metrics of a training stage, one entry per step; of the last attempt if it started over."""
        rows: list[dict[str, Any]] = []
        for row in self.metrics:
            if row.get("stage") == stage:
                if rows and row.get("step", 0) <= rows[-1].get("step", -1):
                    rows = []
                rows.append(row)
        return rows

    @property
    def training_stages(self) -> list[str]:
        """The training stages with metrics, in order: rationale, iteration-1/dpo, ..."""
        return list(dict.fromkeys(row["stage"] for row in self.metrics if "stage" in row))


def read_run(path: Path, live: bool = False) -> RunFiles:
    """Read a run directory, of a run that is done or not.

    Args:
        path: of the directory.
        live: for a display that reads again and again while a run writes: an empty directory is a run that has not begun,
            and finished trainings' metrics are not compared with the manifest.

    Raises:
        InputError: there is no run, or a file is not what a run writes.
        ConfigError: `config.yaml` is not YAML of settings.
    """
    summary_file, manifest_file, config = path / "summary.json", path / "manifest.json", path / "config.yaml"
    if not live and not any(os.path.lexists(file) for file in (summary_file, manifest_file, config)):
        raise InputError(
            file=summary_file,
            expected="the summary of a run, or its manifest.json or config.yaml",
            found="no such file",
            fix="name the directory of a run",
        )
    manifest = _json_if_there(manifest_file, dict[str, dict[str, Any]], {})
    for stage, entry in () if live else manifest.items():
        check_metrics(path / "metrics.jsonl", stage, entry)
    settings = read_yaml(config, {}) if config.is_file() else {}
    check_shape(settings, Settings, config)
    summary = _json_if_there(summary_file, Summary, {})
    # A run that was continued with more rounds has an older summary until it is done.
    if manifest.keys() - {stage["name"] for stage in summary.get("stages", ())} or not summary_file.is_file():
        check_shape(manifest, dict[str, FinishedStage], manifest_file)
        summary = summary_of(manifest)
        check_shape(summary, Summary, manifest_file)
    return RunFiles(
        path=path,
        summary=summary,
        metrics=_json_lines(path / "metrics.jsonl"),
        gallery=_json_if_there(path / "gallery.json", list[Card], []),
        config=settings,
        environment=_json_if_there(path / "environment.json", dict[str, Any], {}),
        finished=list(manifest) or [stage["name"] for stage in summary.get("stages", ())],
        remaining=_remaining(settings, manifest, summary),
        progress=_read_progress(path, manifest),
    )


def _remaining(settings: Mapping[str, Any], manifest: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """List the stages that have not finished: none of a run that has a summary and no manifest, or no settings."""
    if not settings or (summary.get("stages") and not manifest):
        return []
    return [name for name in planned_stages(settings.get("iterations", 1)) if name not in manifest]


def _read_progress(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the newest progress file of an unfinished stage. One that can't be read is passed over: it is being replaced."""
    newest: dict[str, Any] | None = None
    for file in (path / "checkpoint").glob(f"**/{PROGRESS_FILE}"):
        try:
            value = parse_object(regular(file).read_bytes())
            check_shape(value, Progress, file)
        except (OSError, ValueError, InputError):
            continue
        if value["stage"] not in manifest and (newest is None or value["written"] > newest["written"]):
            newest = value
    return newest


def _json_if_there(file: Path, shape: Any, otherwise: Any) -> Any:
    """Read a JSON file and check its shape, where there is one."""
    return _json(file, shape) if os.path.lexists(file) else otherwise


def _json(file: Path, shape: Any) -> Any:
    """Read a JSON file, and check its shape."""
    try:
        value = parse_json(regular(file).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(file=file, expected="JSON", found=error) from error
    check_shape(value, shape, file)
    return value


def _json_lines(file: Path) -> list[dict[str, Any]]:
    """Read the rows of `metrics.jsonl`, except an incomplete last line, which an interrupted run may leave."""
    if not file.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(regular(file).read_bytes().split(b"\n")[:-1], start=1):
        if line.strip():
            try:
                rows.append(parse_object(line))
            except ValueError as error:
                raise InputError(file=file, line=number, expected="a JSON object", found=error) from error
            check_shape(rows[-1], Step, file, number)
    return rows
