"""Read the inputs of a command: settings, datasets, the outputs of earlier stages."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.config.datasets import DatasetConfig
from srcfast.config.load import known_settings, load_config
from srcfast.config.settings import Config
from srcfast.config.yaml import dump_yaml
from srcfast.data.containers import is_table
from srcfast.data.in_order import InOrder, samples_in_order
from srcfast.data.jsonl import COMPLETE, check_writable, read_shards, write_jsonl
from srcfast.data.readers import SAMPLES, check_rejected, read_preferences
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.errors import ConfigError, InputError
from srcfast.hub.names import RECORD
from srcfast.launch import read_launch
from srcfast.run.lock import lock_directory
from srcfast.stages.datasets import read_training_samples, training_sets

# Files that commands write in their --output.
FILES = (COMPLETE, "00000.jsonl", RECORD, "inputs.jsonl", "metrics.jsonl", "rejected.jsonl", "summary.json")
MODEL_FILES = ("adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors")
# What commands and runs write in their output: its other files and folders stay as they are.
WRITTEN = re.compile(
    "|".join(map(re.escape, (*FILES, *MODEL_FILES, "config.yaml")))
    + r"|\d{5}\.jsonl|(manifest|environment|gallery)\.json|iteration-\d+|checkpoint|predictions|profile|rationale|report"
)


@dataclass(frozen=True)
class Source:
    """The data options of a command: --data, --format, --image-root, --follow-links and --duplicate-ids."""

    data: Path | None
    format: str | None
    image_root: Path | None
    follow_links: bool | None = None
    duplicate_ids: str | None = None
    more: tuple[Path, ...] = ()
    """Further paths of --data"""

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths of --data."""
        return () if self.data is None else tuple(map(str, (self.data, *self.more)))


def settings(
    words: Sequence[str] | None,
    section: str | None,
    *,
    model: str | None = None,
    scorer: str | None = None,
    output: Path | None = None,
    quiet: bool = False,
) -> Config:
    """Read the settings of a command line: options win over single settings, and these over the file."""
    file, single = split_words(words)
    named = {"model.path": model, "scorer.path": scorer, "output": output}
    # No stage's section has `model.path` and the like, so they are read from the root.
    single += [
        f"{key}={json.dumps(str(value), ensure_ascii=False)}" for key, value in named.items() if value is not None
    ]
    single += ["quiet=true"] if quiet else []
    return load_config(file, single, section)


def split_words(words: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """Split words into a file, None without one, and `key=value` settings. Raises ConfigError for several files."""
    files = [word for word in words or () if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"expected one CONFIG.yaml and key=value settings, found {' and '.join(files)}")
    return files[0] if files else None, [word for word in words or () if "=" in word]


def complete_words(incomplete: str) -> list[str]:
    """List the completions of a word: `key=` of each setting, and YAML files."""
    keys = [f"{key}=" for key in known_settings() if key.startswith(incomplete)]
    files = [str(path) for path in Path().glob(f"{glob.escape(incomplete)}*") if path.suffix in (".yaml", ".yml")]
    return [*keys, *files]


def is_rank_zero() -> bool:
    """Return whether this process is rank 0 of torchrun, or torchrun has not started it; without importing torch."""
    return read_launch(os.environ).rank == 0


def require_option(value: Path | None, option: str, what: str) -> Path:
    """Return an option's value. Raises ConfigError if the option is not given."""
    if value is None:
        raise ConfigError(f"{option}: expected {what}, found nothing. Fix: name it")
    return value


def check_output(
    config: Config | None,
    output: Path,
    *inputs: str | Path | Sequence[str | Path] | None,
    option: str = "--output",
    is_file: bool = False,
) -> None:
    """Check an output before any work is done for it.

    Raises:
        ConfigError: it is one of the inputs or of those that the settings name, or would replace one or a part of one.
        OSError: it can't be written.
    """
    if config is not None:
        files = (config.rationale.teacher, config.scorer_training.vocabulary, config.scorer_training.verdicts)
        inputs = (
            *inputs,
            config.model.path,
            config.scorer.path,
            *files,
            *(dataset.path for dataset in (*config.data.train, *config.data.evaluation)),
        )
    here = Path(os.path.realpath(output))
    names = [str(name) for path in inputs for name in ([path] if isinstance(path, str | Path) else path or ())]
    for path in (path for name in names if name != "embedded" for path in glob.glob(name) or [name]):
        if relation := _relation(here, Path(os.path.realpath(path)), is_file):
            raise ConfigError(
                f"{option}: expected a path apart from the inputs, found {output}, which {relation} {path}. Fix: name another"
            )
    check_writable(output, is_file=is_file)
    if not is_file:
        check_writable(output / "checkpoint")
        for name in (*FILES, *MODEL_FILES):
            check_writable(output / name, is_file=True)


def _relation(output: Path, path: Path, is_file: bool) -> str:
    """Return how writing an output would replace an input, or a part of it; empty: it would not."""
    if output == path:
        return "is"
    if path in output.parents:
        return "is a file of" if is_file and output.exists() else ""
    return "writes to" if output in path.parents and WRITTEN.fullmatch(path.relative_to(output).parts[0]) else ""


def steps(profile: str | None) -> range | None:
    """Parse the steps of `--profile`."""
    from srcfast.training.profiler import parse_steps

    return None if profile is None else parse_steps(profile)


def datasets(config: Config, source: Source, use: str) -> tuple[DatasetConfig, ...]:
    """Return the dataset of --data, else the config's datasets for `use`: rationale, calibration or evaluation.

    Raises:
        ConfigError: there is no dataset, or the format is unknown.
    """
    if source.data is not None or source.format == "easy_vqa":
        format = source.format or "auto"
        if format not in (*SAMPLES, "auto", "vlmeval_tsv", "easy_vqa"):
            known = ", ".join((*SAMPLES, "vlmeval_tsv"))
            raise ConfigError(f"--format: expected auto, {known} or easy_vqa, found {format!r}")
        if (duplicate_ids := source.duplicate_ids or "reject") not in ("reject", "rename"):
            raise ConfigError(f"--duplicate-ids: expected reject or rename, found {duplicate_ids!r}")
        values = {
            "name": source.data.stem.translate(dict.fromkeys(map(ord, "*?[]"))) or "data" if source.data else format,
            "format": format,
            "path": str(source.data) if source.data and not source.more else source.paths or None,
            "image_root": source.image_root and str(source.image_root),
            "split": "test" if use == "evaluation" else "train",
            "follow_links": bool(source.follow_links),
            "duplicate_ids": duplicate_ids,
        }
        key = "data.evaluation" if use == "evaluation" else "data.train"
        data = load_config(None, [f"{key}={dump_yaml([values], default_flow_style=True, width=10**9)}"]).data
        return data.evaluation or data.train
    if use != "evaluation":
        return training_sets(config, use)
    if not config.data.evaluation:
        raise ConfigError(
            "no data: expected --data FILE, or datasets under data.evaluation in the config. Fix: name one"
        )
    return config.data.evaluation


def read_all(config: Config, source: Source, use: str, rejected: list[dict[str, Any]]) -> list[Sample]:
    """Read the samples of all datasets for a use, "rationale" or "calibration"; append bad records to `rejected`.

    Raises:
        InputError: two samples share an id, or too many records were rejected, or none is good.
    """
    return read_training_samples(datasets(config, source, use), config, Path(config.output) / "images", rejected, use)


@contextmanager
def rejected_records(output: Path, file: Path | None = None) -> Iterator[list[dict[str, Any]]]:
    """Yield a list for bad records; on rank 0 write it to `file`, also where reading ends in an error.

    The file is `rejected.jsonl` in `output` unless it is named.

    A file that an earlier command has left is removed if no record is bad.

    Raises:
        SrcfastError: another process works in `output`.
    """
    rejected: list[dict[str, Any]] = []
    try:
        yield rejected
    finally:
        file = file or output / "rejected.jsonl"
        if is_rank_zero() and (rejected or file.is_file()):
            with lock_directory(output):
                if rejected:
                    write_jsonl(file, rejected)
                else:
                    file.unlink()


def read_preference_file(config: Config, source: Source, rejected: list[dict[str, Any]]) -> list[Preference]:
    """Read preferences from files of any format, or from a directory of shards; append bad ones to `rejected`."""
    path = require_option(source.data, "--data", "preferences, or the folder that `srcfast curate` wrote")
    root = source.image_root or path.parent
    if path.is_dir() and not source.more and not is_table(path):
        recorded: set[str] = set()  # only needed if --image-root may replace a directory that is missing
        if source.image_root is not None:
            recorded = {str(row["image_root"]) for *_, row in read_shards(path) if "image_root" in row}
        return [
            Preference.from_json(
                row, file=file, line=line, image_root=_image_root_of(row, file, line, root, source, recorded)
            )
            for file, line, row in read_shards(path)
        ]
    preferences = read_preferences(
        source.paths,
        format=source.format or "auto",
        image_root=source.image_root,
        rejected=rejected,
        follow_links=bool(source.follow_links),
    )
    check_rejected(rejected, len(rejected) + len(preferences), config.max_rejected)
    if not preferences:
        raise InputError(file=path, expected="at least one pair", found="none", fix="name data that holds some")
    return preferences


def _image_root_of(row: dict[str, Any], file: Path, line: int, root: Path, source: Source, recorded: set[str]) -> Path:
    """Return the directory of a pair's images: the one stored with the pair, else `root`.

    If the stored directory is missing, the images have been moved: --image-root replaces it. Without --image-root it is returned
    unchanged, and reading the first image reports what is missing.

    Args:
        recorded: all directories that the shards store.

    Raises:
        InputError: the stored value is not a path, or is outside --image-root; or the directory is missing and the shards store
            several, which one --image-root can't replace.
    """
    stored = row.pop("image_root", str(root))
    if isinstance(stored, str) and "\0" not in stored:
        if source.image_root is not None and not os.path.lexists(stored):
            if len(recorded) < 2:
                return source.image_root
            raise InputError(
                file=file,
                line=line,
                field="image_root",
                expected=f"images where they were, since one --image-root can't stand for each of {', '.join(sorted(recorded))}",
                found=f"no folder {stored}",
                fix="put them back, or curate the samples again where they are now",
            )
        if source.image_root is None or Path(stored).resolve().is_relative_to(source.image_root.resolve()):
            return Path(stored)
    expected = "a path" if source.image_root is None else f"a path below --image-root ({source.image_root})"
    fix = "name another --image-root, or leave it out if you trust the shards"
    raise InputError(file=file, line=line, field="image_root", expected=expected, found=repr(stored), fix=fix)


def read_candidates(directory: Path | None) -> InOrder[list[Candidate]]:
    """Read the candidates of each sample from the shards in a directory, in their order."""
    shards = require_option(directory, "--candidates", "the folder that `srcfast candidates` wrote")
    return samples_in_order(Candidate.from_json(row, file=file, line=line) for file, line, row in read_shards(shards))
