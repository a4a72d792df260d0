"""A run's directory: paths, settings, step metrics, and the manifest of finished stages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srcfast import distributed
from srcfast.config.yaml import dump_yaml
from srcfast.data.jsonl import (
    as_json,
    check_writable,
    file_hash,
    flatten,
    json_hash,
    naming,
    parse_object,
    read_lines,
    write_json,
    write_jsonl,
    write_text,
)
from srcfast.errors import ConfigError, InputError
from srcfast.run.environment import environment
from srcfast.run.metric_rows import check_metrics, metrics_of, way_out

# The last part of a stage's name; an iteration or a model may precede it, as in "iteration-1/dpo".
STAGES = ("rationale", "candidates", "scores", "preferences", "dpo", "evaluation", "headroom")
# Settings of another stage's section on which a stage depends, by its kind.
SINGLE_SETTINGS: Mapping[str, Sequence[str]] = {"preferences": ("dpo.credit",)}
_ENTRY_TYPES: Mapping[str, tuple[type, ...]] = {
    "settings": (dict,),
    "seconds": (int, float),
    "tokens": (int,),
    "files": (dict,),
}


class StageMetrics:
    """Write the metrics of a training's steps to `metrics.jsonl`, on rank 0.

    Args:
        path: the file.
        stage: written into each row, for a file that several stages share; None: no other stage writes to the file.
    """

    def __init__(self, path: Path, stage: str | None = None) -> None:
        self.path = path
        self._label = {} if stage is None else {"stage": stage}

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append a step's metrics. Raises ValueError for a number that is not finite."""
        if distributed.is_rank_zero():
            line = json.dumps({**self._label, **metrics}, allow_nan=False)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with naming(self.path), open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write(line + "\n")

    def restart(self, history: Iterable[Mapping[str, Any]] = ()) -> None:
        """Replace the rows of a stopped attempt, a half-written line included, by the metrics of the steps that are saved."""
        distributed.run_on_rank_zero(lambda: self._rewrite([{**self._label, **metrics} for metrics in history]))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        others: list[dict[str, Any]] = []
        if self._label and self.path.is_file():
            lines = [row for _, row in read_lines(self.path) if not isinstance(row, InputError)]
            others = [row for row in lines if row.get("stage") != self._label["stage"]]
        if others or rows:
            write_jsonl(self.path, [*others, *rows])
        else:
            self.path.unlink(missing_ok=True)


class RunDirectory:
    """The paths of a run, and its manifest of finished stages.

    `manifest.json`: stage -> {settings, seconds, tokens, finished (UTC), ..., files (path: SHA-256), sha256 (of the entry)}. A
    stage is added once all its files are on disk.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.manifest_file = self.path / "manifest.json"
        self.config_file = self.path / "config.yaml"
        self.environment_file = self.path / "environment.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.rejected_file = self.path / "rejected.jsonl"
        self.report_file = self.path / "report" / "index.html"
        self.rationale_adapter = self.path / "rationale" / "adapter"

    def iteration(self, number: int) -> Path:
        """Return `iteration-K`, K from 1, which holds candidates/, scores/, preferences/ and adapter/."""
        return self.path / f"iteration-{number}"

    def adapter(self, iteration: int) -> Path:
        """Return the directory of the adapter after an iteration; 0: the adapter after rationale fine-tuning."""
        return self.iteration(iteration) / "adapter" if iteration else self.rationale_adapter

    def checkpoint(self, stage: str) -> Path:
        """Return the directory of an unfinished stage's checkpoints and chunks. No stage's directory is inside another's."""
        of, _, kind = stage.rpartition("/")
        # "rationale/evaluation" would be inside "rationale", and be removed with it.
        return self.path / "checkpoint" / (f"evaluation/{of}" if kind == "evaluation" else stage)

    def write_config(self, config: Any) -> None:
        """Write the resolved settings (a pydantic model) as `config.yaml`, and `environment.json`.

        Raises what writing the other files of a run would raise, hours later, where something else lies in their way.
        """
        rounds = [f"iteration-{number}" for number in range(1, config.iterations + 1)]
        folders = [f"{name}/{kind}" for name in rounds for kind in ("candidates", "scores", "preferences", "adapter")]
        folders += [
            "checkpoint",
            "rationale/adapter",
            *(f"predictions/{name}" for name in ("base", "rationale", *rounds)),
        ]
        for name in folders:
            check_writable(self.path / name)
        for file in (self.manifest_file, self.metrics_file, self.summary_file, self.rejected_file, self.report_file):
            check_writable(file, is_file=True)
        text = dump_yaml(config.model_dump(mode="json"), sort_keys=False)
        write_text(self.config_file, text)
        write_json(self.environment_file, environment())

    def manifest(self) -> dict[str, Any]:
        """Read the entries of the finished stages, in the order in which they finished.

        Raises:
            InputError: the file can't be read, or an entry was changed since it was written.
        """
        if not self.manifest_file.is_file():
            return {}
        try:
            entries = parse_object(self.manifest_file.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(
                file=self.manifest_file,
                expected="a JSON object of finished stages",
                found=error,
                fix="take another output directory",
            ) from error
        for name, entry in entries.items():
            if fault := _entry_fault(name, entry):
                raise InputError(
                    file=self.manifest_file,
                    field=name,
                    expected="the entry as it was written, by its sha256",
                    found=fault,
                    fix=f"put the file back as it was, or remove {name!r} and what comes after it: that is done again",
                )
        return entries

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """Read the metrics of a training's steps; a malformed row is passed over, as `check_metrics` warns of it."""
        lines = read_lines(self.metrics_file) if self.metrics_file.is_file() else ()
        rows = [row for _, row in lines if not isinstance(row, InputError)]
        return [row for row in rows if row.get("stage") == stage and type(row.get("step")) is int]

    def written_by(self, stage: str) -> list[Path]:
        """List the files that a finished stage has written for later stages."""
        of, _, kind = stage.rpartition("/")
        directories = {
            "rationale": self.rationale_adapter,
            "dpo": self.path / of / "adapter",
            "evaluation": self.path / "predictions" / of,
        }
        return sorted(file for file in directories.get(kind, self.path / stage).glob("*") if file.is_file())

    def check_files(self, stage: str, entry: Mapping[str, Any]) -> None:
        """Raise InputError if a file that a finished stage wrote is missing or was changed since; warn of changed metrics."""
        check_metrics(self.metrics_file, stage, entry)
        for name, expected in entry.get("files", {}).items():
            file = self.path / name
            actual = file_hash(file) if file.is_file() else "no file"
            if actual != expected:
                raise InputError(
                    file=file,
                    expected=f"what stage {stage!r} wrote, of SHA-256 {expected}",
                    found=actual,
                    fix=way_out(stage),
                )

    def stage_done(self, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return the manifest's entry if the stage finished with these settings, None if it did not finish.

        Raises:
            ConfigError: it finished with other settings; the first changed one is named.
            InputError: the manifest, or a file that the stage wrote, was changed or is missing.
        """
        entry = self.manifest().get(name)
        if entry is None:
            return None
        self._check_settings(name, entry, settings)
        self.check_files(name, entry)
        return entry

    def check_finished(self, settings: Mapping[str, Any]) -> None:
        """Raise ConfigError if a stage was finished with other settings than these, all of a run by section."""
        for name, entry in self.manifest().items():
            names = dict.fromkeys((*entry["settings"], *SINGLE_SETTINGS.get(name.rpartition("/")[2], ())))
            self._check_settings(name, entry, settings_of(settings, names))

    def _check_settings(self, name: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        wanted, stored = flatten(as_json(settings)), flatten(entry["settings"])
        changed = [key for key in wanted | stored if wanted.get(key) != stored.get(key)]
        if changed:
            key = changed[0]
            more = f" (and {len(changed) - 1} more: {', '.join(changed[1:6])})" if len(changed) > 1 else ""
            raise ConfigError(
                f"{self.manifest_file}: stage {name!r} finished with {key} = {stored.get(key)!r}, "
                f"this run asks for {wanted.get(key)!r}{more}. "
                f"Fix: set {key} back, or take another name or output directory"
            )

    def finish_stage(
        self, name: str, settings: dict[str, Any], seconds: float, tokens: int = 0, **more: Any
    ) -> dict[str, Any]:
        """Add a stage, whose files must be on disk, to the manifest, and return its entry.

        Args:
            name: of the stage.
            settings: that its result depends on.
            seconds: wall-clock time of the stage.
            tokens: that the stage ran.
            more: further fields of the entry.
        """
        entries = self.manifest()
        entry = {
            "settings": as_json(settings),
            "seconds": seconds,
            "tokens": tokens,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **more,
            **({"metrics": metrics} if (metrics := metrics_of(self.metrics_file, name))["rows"] else {}),
            "files": {str(file.relative_to(self.path)): file_hash(file) for file in self.written_by(name)},
        }
        entries[name] = entry | {"sha256": _entry_hash(name, as_json(entry))}
        write_json(self.manifest_file, entries)
        return entries[name]


def iteration_of(name: str) -> int:
    """Return the round that a stage's or a model's name says (`iteration-K/KIND`, `iteration-K`), 0 for none."""
    of = name.partition("/")[0]
    return int(of.removeprefix("iteration-")) if of.startswith("iteration-") else 0


def settings_of(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the named settings of a run's: sections, or single ones by dotted name. Those that are not there are None.

    A single one that is younger than some runs is not there while it has its default (`Config.identity`).
    """

    def value(name: str) -> Any:
        section, _, rest = name.partition(".")
        return settings.get(section, {}).get(rest) if rest else settings.get(section)

    return {name: value(name) for name in names}


def _entry_hash(name: str, entry: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a stage's name and manifest entry."""
    hashed = {key: value for key, value in entry.items() if key != "sha256"}
    return json_hash([name, hashed])


def _entry_fault(name: str, entry: Any) -> str:
    """Return what is wrong with an entry of the manifest; empty: nothing."""
    if name.rpartition("/")[2] not in STAGES:
        return f"a stage that is none of {', '.join(STAGES)}"
    if not isinstance(entry, dict) or entry.get("sha256") != _entry_hash(name, entry):
        return "another"
    for key, kinds in _ENTRY_TYPES.items():
        if not isinstance(entry.get(key), kinds):
            return f"{key} = {entry.get(key)!r}"
    return ""
