"""What the page reads: the files of a run directory, those that are there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from srcfast.errors import InputError


@dataclass(frozen=True)
class RunFiles:
    """A run's results. What a run has not come to yet is empty."""

    path: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]  # one a training step; `stage` tells which training
    gallery: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The summary's evaluations, in the order in which they were made."""
        return self.summary.get("evaluations", [])

    @property
    def models(self) -> list[str]:
        """base, rationale, iteration-1, ...: those evaluated, in that order."""
        return list(dict.fromkeys(row["model"] for row in self.evaluations))

    @property
    def splits(self) -> list[tuple[str, str]]:
        """(dataset, split) of the evaluations, in order."""
        return list(dict.fromkeys((row["dataset"], row["split"]) for row in self.evaluations))

    def evaluation(self, model: str, dataset: str, split: str) -> dict[str, Any] | None:
        """The evaluation of a model on a split, None where there is none."""
        wanted = (model, dataset, split)
        found = (row for row in self.evaluations if (row["model"], row["dataset"], row["split"]) == wanted)
        return next(found, None)

    def training(self, stage: str) -> list[dict[str, Any]]:
        """The metrics of one training stage, a step each; the last attempt's where it was begun anew."""
        rows: list[dict[str, Any]] = []
        for row in self.metrics:
            if row.get("stage") == stage:
                if rows and row.get("step", 0) <= rows[-1].get("step", -1):
                    rows = []
                rows.append(row)
        return rows

    @property
    def training_stages(self) -> list[str]:
        """rationale, iteration-1/dpo, ...: those with metrics."""
        return list(dict.fromkeys(row["stage"] for row in self.metrics if "stage" in row))


def read_run(path: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        InputError: there is no `summary.json`, or a file is not what a run writes.
    """
    if not (path / "summary.json").is_file():
        raise InputError(
            file=path / "summary.json",
            expected="the summary of a run",
            found="no such file",
            mend="name the directory of a run that has been evaluated",
        )
    gallery = path / "gallery.json"
    environment = path / "environment.json"
    config = path / "config.yaml"
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except yaml.YAMLError as error:
        raise InputError(file=config, expected="YAML", found=error) from error
    return RunFiles(
        path=path,
        summary=_json(path / "summary.json", dict),
        metrics=_json_lines(path / "metrics.jsonl"),
        gallery=_json(gallery, list) if gallery.is_file() else [],
        config=settings or {},
        environment=_json(environment, dict) if environment.is_file() else {},
    )


def _json(file: Path, kind: type) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(file=file, expected="JSON", found=error) from error
    if not isinstance(value, kind):
        raise InputError(file=file, expected=f"a JSON {kind.__name__}", found=type(value).__name__)
    return value


def _json_lines(file: Path) -> list[dict[str, Any]]:
    """Rows of a file that grows: a last line that was cut short when a run was stopped is left out."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise InputError(file=file, line=number, expected="JSON", found=error) from error
    return rows
