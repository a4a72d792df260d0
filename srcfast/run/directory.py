"""A run's directory: its settings, its surroundings, and which stages are done with which settings."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from srcfast import distributed
from srcfast.data.jsonl import (
    file_hash,
    is_temporary,
    json_hash,
    naming,
    parse_object,
    read_lines,
    remove_temporary,
    write_json,
    write_jsonl,
    write_text,
)
from srcfast.errors import ConfigError, InputError, SrcfastError
from srcfast.run.progress import MetricsWriter

# A stage's name ends in one of these; before it may stand which iteration's, or which model's.
STAGES = ("rationale", "candidates", "scores", "preferences", "dpo", "evaluation", "headroom")
_ENTRY: Mapping[str, tuple[type, ...]] = {
    "settings": (dict,),
    "seconds": (int, float),
    "tokens": (int,),
    "files": (dict,),
}


class StageMetrics:
    """The metrics of a training's steps in `metrics.jsonl`; rank 0 writes.

    Args:
        path: the file.
        stage: named in each row of a file that several stages write; None: the file is this training's alone.
    """

    def __init__(self, path: Path, stage: str | None = None) -> None:
        self.path = path
        self._label = {} if stage is None else {"stage": stage}

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append a step's metrics."""
        if distributed.is_rank_zero():
            with MetricsWriter(self.path) as writer:
                writer.write({**self._label, **metrics})

    def restart(self, history: Iterable[Mapping[str, Any]] = ()) -> None:
        """Replace what a stopped attempt left, a half-written line included, by the metrics of the steps that stay done."""
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
    """Where everything of a run lies; the manifest says what is finished.

    `manifest.json`: stage -> {settings, seconds, tokens, finished (UTC), ..., files (what it wrote: SHA-256), sha256 (of the
    entry)}. A stage is entered when all it wrote is on disk.
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
        """`iteration-K`, K from 1: holds candidates/, scores/, preferences/ and adapter/."""
        return self.path / f"iteration-{number}"

    def adapter(self, iteration: int) -> Path:
        """The adapter after an iteration; 0 is the rationale-fine-tuned one."""
        return self.iteration(iteration) / "adapter" if iteration else self.rationale_adapter

    def checkpoint(self, stage: str) -> Path:
        """Where a stage's work is saved until it is finished: a folder that lies within no other stage's.

        "rationale/evaluation" would lie within "rationale", and be forgotten with it.
        """
        of, _, kind = stage.rpartition("/")
        return self.path / "checkpoint" / (f"evaluation/{of}" if kind == "evaluation" else stage)

    def remove_checkpoint(self, stage: str) -> None:
        """Of a stage that is finished."""
        shutil.rmtree(self.checkpoint(stage), ignore_errors=True)

    def write_config(self, config: Any) -> None:
        """Write the resolved settings (a pydantic model) as `config.yaml`, and `environment.json`."""
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_text(self.config_file, text)
        write_json(self.environment_file, environment())

    def manifest(self) -> dict[str, Any]:
        """Entries of the finished stages, in the order in which they finished."""
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

    def written_by(self, stage: str) -> list[Path]:
        """The files that a finished stage has left for others."""
        of, _, kind = stage.rpartition("/")
        places = {
            "rationale": self.rationale_adapter,
            "dpo": self.path / of / "adapter",
            "evaluation": self.path / "predictions" / of,
        }
        return sorted(file for file in places.get(kind, self.path / stage).glob("*") if file.is_file())

    def check_files(self, stage: str, entry: Mapping[str, Any]) -> None:
        """Raises InputError where a file that a finished stage wrote is no longer what it was."""
        for name, expected in entry.get("files", {}).items():
            file = self.path / name
            found = file_hash(file) if file.is_file() else "no file"
            if found != expected:
                raise InputError(
                    file=file,
                    expected=f"what stage {stage!r} wrote, of SHA-256 {expected}",
                    found=found,
                    fix=f"put it back as it was, or remove {stage!r} and what comes after it from {self.manifest_file}: "
                    "that is done again",
                )

    def stage_done(self, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The manifest's entry if the stage finished with these settings, None if it did not finish.

        Raises:
            ConfigError: it finished with other settings; the first changed one is named.
            InputError: the manifest, or a file that the stage wrote, is damaged.
        """
        entry = self.manifest().get(name)
        if entry is None:
            return None
        wanted, stored = flat(plain(settings)), flat(entry["settings"])
        changed = [key for key in wanted | stored if wanted.get(key) != stored.get(key)]
        if changed:
            key = changed[0]
            more = f" (and {len(changed) - 1} more: {', '.join(changed[1:6])})" if len(changed) > 1 else ""
            raise ConfigError(
                f"{self.manifest_file}: stage {name!r} finished with {key} = {stored.get(key)!r}, "
                f"this run asks for {wanted.get(key)!r}{more}. "
                f"Fix: set {key} back, or take another name or output directory"
            )
        self.check_files(name, entry)
        return entry

    def finish_stage(
        self, name: str, settings: dict[str, Any], seconds: float, tokens: int = 0, **more: Any
    ) -> dict[str, Any]:
        """Enter a stage as finished; what it wrote must be on disk. Returns its entry."""
        entries = self.manifest()
        entry = {
            "settings": plain(settings),
            "seconds": seconds,
            "tokens": tokens,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **more,
            "files": {str(file.relative_to(self.path)): file_hash(file) for file in self.written_by(name)},
        }
        entries[name] = entry | {"sha256": _entry_hash(name, plain(entry))}
        write_json(self.manifest_file, entries)
        return entries[name]


@contextmanager
def exclusive_lock(directory: Path, *, whole: bool = False) -> Iterator[None]:
    """No other process works in this directory for as long as the body runs; the ranks of one torchrun count as one.

    What killed processes have left half-written (`.name.PID.tmp`) is removed first.

    Args:
        directory: made where there is none.
        whole: all folders below are a run's, too; else only what lies in the directory itself, and in `checkpoint/`.

    Raises:
        SrcfastError: another process works there, or it can't be written.
    """
    lock: Any = None

    def take() -> None:
        nonlocal lock
        lock = _lock(directory)
        places = (
            directory.rglob(".*.tmp") if whole else (*directory.glob(".*.tmp"), *directory.glob("checkpoint/.*.tmp"))
        )
        for path in list(places):
            if is_temporary(path):
                remove_temporary(path)

    distributed.run_on_rank_zero(take)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()  # which opens the lock; so does the end of the process, however it ends


def _lock(directory: Path) -> Any:
    """The open lock file. A record lock: the worker processes that are forked while it is held don't hold it, too."""
    file = directory / ".lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        opened = open(file, "a+", encoding="utf-8")  # noqa: SIM115  (closed by the caller)
    except OSError as error:
        raise SrcfastError(
            f"{directory}: expected a directory that can be written, found {error.strerror or error}. "
            "Fix: name another output directory, or see to its permissions"
        ) from error
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        opened.seek(0)
        holder = opened.read().strip() or "unknown"
        opened.close()
        raise SrcfastError(
            f"{directory}: expected no other process to work here, found one ({holder}) that holds {file.name} ({error}). "
            "Fix: wait until it has ended, or take another name or output directory"
        ) from error
    try:
        with naming(file):
            opened.truncate(0)
            opened.write(f"process {os.getpid()} on {platform.node()}\n")
            opened.flush()
    except OSError:
        with suppress(OSError):  # closing tries to write once more
            opened.close()
        raise
    return opened


def _entry_hash(name: str, entry: Mapping[str, Any]) -> str:
    """SHA-256 of a stage's entry in the manifest, its name with it."""
    rest = {key: value for key, value in entry.items() if key != "sha256"}
    return json_hash([name, rest])


def _entry_fault(name: str, entry: Any) -> str:
    """Why this is no entry of the manifest; empty if it is one."""
    if name.rpartition("/")[2] not in STAGES:
        return f"a stage that is none of {', '.join(STAGES)}"
    if not isinstance(entry, dict) or entry.get("sha256") != _entry_hash(name, entry):
        return "another"
    for key, kinds in _ENTRY.items():
        if not isinstance(entry.get(key), kinds):
            return f"{key} = {entry.get(key)!r}"
    return ""


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists, paths are strings."""
    return json.loads(json.dumps(settings, default=str))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names to leaves."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else key)
    return found


def environment() -> dict[str, Any]:
    """What this machine and installation are: for `environment.json` and `doctor`."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "srcfast": version("srcfast"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": _git_commit(),
    }


def version(distribution: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Commit of the sources, where they lie in a git work tree."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed elsewhere: a work tree around it would not be ours
        return None
    command = ["git", "-C", str(root), "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
