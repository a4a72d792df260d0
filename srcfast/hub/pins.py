"""Replace names of the Hub in settings and options by names at a commit, and record the commits in a directory.

The commits that `hub.json` holds are used again: a branch that moves changes no run that has begun.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from srcfast.config.datasets import DatasetConfig
from srcfast.config.settings import Config
from srcfast.data.jsonl import parse_object, regular, write_json
from srcfast.errors import InputError
from srcfast.hub.download import commit_of, fetch
from srcfast.hub.names import RECORD, HubName, dataset_name, is_commit, local_data, local_model, model_name
from srcfast.run.lock import lock_directory

Model = Literal["model", "scorer"]
Data = Literal["train", "evaluation"]


def pinned(
    config: Config,
    directory: Path | None,
    *,
    models: Sequence[Model] = (),
    data: Sequence[Data] = (),
    weights: bool = True,
) -> Config:
    """Download the models and datasets that settings name, and return the settings with each name at its commit.

    All ranks call it; rank 0 downloads. Settings that name nothing of the Hub are returned as they are, without a request.

    Args:
        directory: holds, or gets, `hub.json`; None: commits are not recorded.
        models: sections whose `path` is read.
        data: which lists of datasets are read.
        weights: whether the models' weights are needed.

    Raises:
        SrcfastError: a name can't be downloaded.
        InputError: `hub.json` is damaged.
    """
    texts = [name for section in models if (name := model_name(getattr(config, section).path)) is not None]
    sets = {key: getattr(config.data, key) for key in data}
    texts += [name for datasets in sets.values() for dataset in datasets for name in _names_of(dataset)]
    if not texts:
        return config
    commits = commits_of(texts, directory, config.quiet, weights)
    changes: dict[str, Any] = {}
    for section in models:
        settings = getattr(config, section)
        if (name := model_name(settings.path)) is not None:
            changes[section] = settings.model_copy(update={"path": _at_commit(name, commits)})
    if sets:
        pinned_sets: dict[str, Any] = {
            key: tuple(_pinned_dataset(each, commits) for each in datasets) for key, datasets in sets.items()
        }
        changes["data"] = config.data.model_copy(update=pinned_sets)
    # Copies, which know which settings were set; `replace` would set all.
    return config.model_copy(update=changes)


def fetched_model(path: Path | None, directory: Path | None, quiet: bool) -> Path | None:
    """Return the directory of an adapter: a name is downloaded, and recorded as in `pinned`."""
    if path is None or (name := model_name(str(path))) is None:
        return path
    return local_model(_at_commit(name, commits_of([name], directory, quiet)))


def fetched_data(paths: Sequence[Path], directory: Path | None, quiet: bool) -> list[Path]:
    """Return the files of --data: names are downloaded, and recorded as in `pinned`."""
    names = {path: name for path in paths if (name := dataset_name(str(path))) is not None}
    commits = commits_of(list(names.values()), directory, quiet) if names else {}
    return [Path(local_data(_at_commit(names[path], commits))) if path in names else path for path in paths]


def commits_of(
    names: Sequence[HubName], directory: Path | None, quiet: bool = False, weights: bool = True
) -> dict[str, str]:
    """Download repositories on rank 0, and return the commit of each by `HubName.label`; the other ranks wait.

    Raises:
        SrcfastError: as `fetch`; on the other ranks where rank 0 has failed.
    """
    from srcfast import distributed  # here, since commands that need no PyTorch read names, too

    return distributed.run_long_on_rank_zero(lambda: _fetch_all(names, directory, quiet, weights))


def _fetch_all(names: Sequence[HubName], directory: Path | None, quiet: bool, weights: bool) -> dict[str, str]:
    """Download each name at its recorded commit, else at the one that its revision has now, which is recorded before."""
    commits = {} if directory is None else read_record(directory)
    new = {
        name.label: commit_of(name)
        for name in {each.label: each for each in names}.values()
        if name.label not in commits
    }
    if directory is not None and new:
        with lock_directory(directory):
            commits = new | read_record(directory)  # another process may have recorded one meanwhile
            write_json(directory / RECORD, commits)
    commits = new | commits
    for name in dict.fromkeys(names):
        commit = commits[name.label]
        # A recorded commit may not be the branch's any more, and the cache, which others share, is not to say so.
        fetch(name if new.get(name.label) == commit else replace(name, revision=commit), commit, quiet, weights)
    return {name.label: commits[name.label] for name in names}


def read_record(directory: Path) -> dict[str, str]:
    """Read the commits by name of a directory's `hub.json`; empty without one. Raises InputError where it is damaged."""
    file = directory / RECORD
    if not file.is_file():
        return {}
    try:
        values = parse_object(regular(file).read_bytes())
        if not all(isinstance(commit, str) and is_commit(commit) for commit in values.values()):
            raise ValueError("a value that is no commit")
    except (OSError, ValueError) as error:
        expected, fix = (
            "commits by the names of repositories",
            "put it back as it was, or take another output directory",
        )
        raise InputError(file=file, expected=expected, found=error, fix=fix) from error
    return values


def _at_commit(name: HubName, commits: Mapping[str, str]) -> str:
    return replace(name, revision=commits[name.label]).text


def _names_of(dataset: DatasetConfig) -> list[HubName]:
    """List the names among a dataset's files and image roots."""
    paths = (*dataset.paths, *dataset.image_roots)
    return [name for path in paths if (name := dataset_name(path)) is not None]


def _pinned_dataset(dataset: DatasetConfig, commits: Mapping[str, str]) -> DatasetConfig:
    """Return a dataset's settings with its names at their commits."""

    def at_commit(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if value is None or isinstance(value, str):
            name = None if value is None else dataset_name(value)
            return value if name is None else _at_commit(name, commits)
        return tuple(str(at_commit(each)) for each in value)

    return dataset.model_copy(update={"path": at_commit(dataset.path), "image_root": at_commit(dataset.image_root)})
