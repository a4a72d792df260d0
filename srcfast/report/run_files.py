"""Read the files of a run directory that the page shows; most are optional."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.config.yaml import read_yaml
from srcfast.data.jsonl import parse_json, parse_object, regular
from srcfast.errors import InputError
from srcfast.report.shapes import Card, Settings, Step, Summary, check_shape
from srcfast.run.metric_rows import check_metrics


@dataclass(frozen=True)
class RunFiles:
    """A run's results; those of stages that have not run yet are empty."""

    path: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]  # one entry per training step; `stage` names the training
    gallery: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]

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


def read_run(path: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        InputError: `summary.json` is missing, or a file is not what a run writes.
        ConfigError: `config.yaml` is not YAML of settings.
    """
    if not os.path.isfile(path / "summary.json"):
        raise InputError(
            file=path / "summary.json",
            expected="the summary of a run",
            found="no such file",
            fix="name the directory of a run that has been evaluated",
        )
    manifest = path / "manifest.json"
    for stage, entry in (_json(manifest, dict[str, dict[str, Any]]) if manifest.is_file() else {}).items():
        check_metrics(path / "metrics.jsonl", stage, entry)
    gallery = path / "gallery.json"
    environment = path / "environment.json"
    config = path / "config.yaml"
    settings = read_yaml(config, {}) if config.is_file() else {}
    check_shape(settings, Settings, config)
    return RunFiles(
        path=path,
        summary=_json(path / "summary.json", Summary),
        metrics=_json_lines(path / "metrics.jsonl"),
        gallery=_json(gallery, list[Card]) if gallery.is_file() else [],
        config=settings,
        environment=_json(environment, dict[str, Any]) if environment.is_file() else {},
    )


def _json(file: Path, shape: Any) -> Any:
    """Read a JSON file, and check its shape."""
    try:
        value = parse_json(file.read_bytes())
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
