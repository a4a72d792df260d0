"""What a command line names: settings, data, the outputs of earlier stages."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.config.load import known_keys, load_config, load_with_sources
from srcfast.config.settings import Config, DatasetConfig
from srcfast.config.yaml import read_yaml
from srcfast.data.in_order import InOrder
from srcfast.data.jsonl import read_shards, write_jsonl
from srcfast.data.readers import check_rejected
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.errors import ConfigError, InputError
from srcfast.stages.datasets import read_dataset

ENDINGS = {".jsonl": "jsonl", ".json": "llava", ".tsv": "vlmeval_tsv"}


@dataclass(frozen=True)
class Source:
    """The file named on the command line, if any."""

    data: Path | None
    format: str | None
    image_root: Path | None


def settings(
    words: Sequence[str] | None,
    section: str | None,
    *,
    model: str | None = None,
    scorer: str | None = None,
    output: Path | None = None,
    quiet: bool = False,
) -> Config:
    """Return the settings of a command line: its file, then its single settings, then its options, which win."""
    files, single = _files_and_settings(words)
    named = {"model.path": model, "scorer.path": scorer, "output": output}
    # An option's full name is in no section, so it is read from the root.
    single += [f"{key}={json.dumps(str(value))}" for key, value in named.items() if value is not None]
    single += ["quiet=true"] if quiet else []
    config = load_config(files[0] if files else None, single, section)
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    return config


def settings_and_sources(words: Sequence[str] | None) -> tuple[Config, dict[str, str]]:
    """Return the settings of a command line, and where each one that is no default was set."""
    files, single = _files_and_settings(words)
    return load_with_sources(files[0] if files else None, single)


def _files_and_settings(words: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Raise ConfigError where the words name several files."""
    files = [word for word in words or () if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"expected one CONFIG.yaml and key=value settings, found {' and '.join(files)}")
    return files, [word for word in words or () if "=" in word]


def complete_words(incomplete: str) -> list[str]:
    """Return what a shell may complete a word to: `key=` of every setting, and YAML files."""
    keys = [f"{key}=" for key in known_keys() if key.startswith(incomplete)]
    files = [str(path) for path in Path().glob(f"{glob.escape(incomplete)}*") if path.suffix in (".yaml", ".yml")]
    return [*keys, *files]


def is_rank_zero() -> bool:
    """Whether this process is torchrun's rank 0, or there is no torchrun: without asking PyTorch."""
    return int(os.environ.get("RANK", "0")) == 0


def need(value: Path | None, option: str, what: str) -> Path:
    """An option's value. Raises ConfigError where it is not given."""
    if value is None:
        raise ConfigError(f"{option}: expected {what}, found nothing. Fix: name it")
    return value


def steps(profile: str | None) -> range | None:
    """The steps that `--profile` names."""
    from srcfast.training.profiler import parse_steps

    return None if profile is None else parse_steps(profile)


def datasets(config: Config, source: Source, use: str) -> tuple[DatasetConfig, ...]:
    """The dataset named on the command line, else the config's for rationale, calibration or evaluation."""
    if source.data is not None or source.format == "easy_vqa":
        format = source.format or ENDINGS.get("" if source.data is None else source.data.suffix.lower(), "jsonl")
        path = None if source.data is None else str(source.data)
        root = None if source.image_root is None else str(source.image_root)
        values = {
            "name": source.data.stem if source.data else format,
            "format": format,
            "path": path,
            "image_root": root,
        }
        if format not in ("jsonl", "llava", "vlmeval_tsv", "easy_vqa"):
            raise ConfigError(f"--format: expected jsonl, llava, vlmeval_tsv or easy_vqa, found {format!r}")
        return (DatasetConfig.model_validate(values | {"split": "test" if use == "evaluation" else "train"}),)
    found = config.data.evaluation
    if use != "evaluation":
        found = tuple(one for one in config.data.train if use in one.use)
    if not found:
        where = "data.evaluation" if use == "evaluation" else "data.train"
        raise ConfigError(f"no data: expected --data FILE, or datasets under {where} in the config. Fix: name one")
    return found


def read_all(config: Config, source: Source, use: str, output: Path) -> list[Sample]:
    """The samples of all datasets for a use; what was rejected lies beside the output."""
    rejected: list[dict[str, Any]] = []
    samples = [
        sample
        for dataset in datasets(config, source, use)
        for sample in read_dataset(dataset, Path(config.output) / "images", rejected)
    ]
    write_rejected(rejected, len(samples), config.max_rejected, output)
    return samples


def write_rejected(rejected: Sequence[dict[str, Any]], kept: int, limit: int | float, output: Path) -> None:
    """Write `rejected.jsonl` into the folder `output`, if anything was rejected.

    Raises:
        InputError: more was rejected than `max_rejected` allows, or nothing is left.
    """
    if not rejected and kept:
        return
    file = output / "rejected.jsonl"
    if rejected and is_rank_zero():
        write_jsonl(file, rejected)
    check_rejected(rejected, len(rejected) + kept, limit)
    if not kept:
        raise InputError(expected="at least one sample", found="none", fix="name data that holds some")


def read_preference_file(config: Config, source: Source, output: Path) -> list[Preference]:
    """Preferences from a file (JSON lines, or TRL's JSON) or from a folder of shards."""
    path = need(source.data, "--data", "a file of preferences, or the folder that `srcfast curate` wrote")
    root = source.image_root or path.parent
    if path.is_dir():
        recorded: set[str] = set()  # asked for only where a folder is to stand for those that are gone
        if source.image_root is not None:
            recorded = {str(row["image_root"]) for *_, row in read_shards(path) if "image_root" in row}
        return [
            Preference.from_json(
                row, file=file, line=line, image_root=_own_root(row, file, line, root, source, recorded)
            )
            for file, line, row in read_shards(path)
        ]
    from srcfast.data.readers import read_preferences

    rejected: list[dict[str, Any]] = []
    format = source.format or ("trl" if path.suffix == ".json" else "jsonl")
    preferences = read_preferences(path, format=format, image_root=root, rejected=rejected)
    write_rejected(rejected, len(preferences), config.max_rejected, output)
    return preferences


def _own_root(row: dict[str, Any], file: Path, line: int, root: Path, source: Source, recorded: set[str]) -> Path:
    """The folder of a pair's images that travels with it; `root` where it names none.

    One that is no longer there is where the images were before they were moved: then it is the --image-root that is given,
    and without one it is returned as it is, so that the first image says what is missing.

    Args:
        recorded: all folders that the shards name.

    Raises:
        InputError: it is no path, or lies outside of the --image-root that is given; or it is no longer there and is one of
            several, for which one --image-root can't stand.
    """
    own = row.pop("image_root", str(root))
    if isinstance(own, str) and "\0" not in own:
        if source.image_root is not None and not os.path.lexists(own):
            if len(recorded) < 2:
                return source.image_root
            raise InputError(
                file=file,
                line=line,
                field="image_root",
                expected=f"images where they were, since one --image-root can't stand for each of {', '.join(sorted(recorded))}",
                found=f"no folder {own}",
                fix="put them back, or curate the samples again where they are now",
            )
        if source.image_root is None or Path(own).resolve().is_relative_to(source.image_root.resolve()):
            return Path(own)
    expected = "a path" if source.image_root is None else f"a path below --image-root ({source.image_root})"
    fix = "name another --image-root, or none where the shards are your own"
    raise InputError(file=file, line=line, field="image_root", expected=expected, found=repr(own), fix=fix)


def read_candidates(directory: Path | None) -> InOrder[list[Candidate]]:
    from srcfast.data.in_order import samples_in_order

    place = need(directory, "--candidates", "the folder that `srcfast candidates` wrote")
    return samples_in_order(
        Candidate.from_json(row, file=file, line=line, image_root=place) for file, line, row in read_shards(place)
    )


def read_vocabulary(path: str | None) -> dict[str, Sequence[str]]:
    if path is None:
        from srcfast.world.claims import VOCABULARY

        return dict(VOCABULARY)
    try:
        found = read_yaml(Path(path), {})
    except ConfigError as error:
        raise ConfigError(f"scorer_training.vocabulary: {error}") from error
    if not found or not all(isinstance(words, list) and len(words) > 1 for words in found.values()):
        raise ConfigError(f"scorer_training.vocabulary: {path}: expected {{class: [word, word, ...]}}")
    return {str(name): tuple(str(word) for word in words) for name, words in found.items()}
