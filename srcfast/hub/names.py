"""Names of the Hub's repositories, and the directories of what was downloaded. Nothing here uses the network."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

RECORD = "hub.json"  # of a run or a command: the commits of the names that it has read
MAIN = "main"  # the branch of a name without a revision
_SCHEME = r"hf:/{1,2}"  # pathlib makes one slash of two
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_TAG = r"[A-Za-z0-9._][A-Za-z0-9._-]*"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MODEL = re.compile(rf"({_SCHEME})?({_PART}/{_PART})(?:@({_TAG}(?:/{_TAG})*))?")
_DATASET = re.compile(rf"{_SCHEME}datasets/({_PART}/{_PART})(?:@(refs/(?:convert|pr)/{_TAG}|{_TAG}))?/(.+)", re.DOTALL)
_SNAPSHOT = re.compile(rf"models--({_PART}?)--({_PART})/snapshots/([0-9a-f]{{40}})")


@dataclass(frozen=True)
class HubName:
    """A repository at a revision, and of a dataset the file, glob or folder in it."""

    kind: Literal["model", "dataset"]
    repository: str
    revision: str = MAIN
    file: str = ""

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which can't move."""
        return _COMMIT.fullmatch(self.revision) is not None

    @property
    def label(self) -> str:
        """Repository and revision in messages and records."""
        return f"{'datasets/' if self.kind == 'dataset' else ''}{self.repository}@{self.revision}"

    @property
    def text(self) -> str:
        """The name as settings have it; no local path has this form."""
        return f"hf://{self.label}{f'/{self.file}' if self.file else ''}"


def model_name(text: str) -> HubName | None:
    """Read `owner/name`, `owner/name@revision`, or either after `hf://`; None for a local path.

    Without `hf://` a path that exists is local, and so is a missing one whose first folder exists.
    """
    match = _MODEL.fullmatch(text)
    if match is None or (match[1] is None and (os.path.lexists(text) or os.path.isdir(text.partition("/")[0]))):
        return None
    return HubName("model", match[2], match[3] or MAIN)


def dataset_name(text: str) -> HubName | None:
    """Read `hf://datasets/owner/name/FILE` or `hf://datasets/owner/name@revision/FILE`; None for anything else."""
    match = _DATASET.fullmatch(text)
    if match is None or {"", ".", ".."} & {*match[3].rstrip("/").split("/")}:
        return None
    return HubName("dataset", match[1], match[2] or MAIN, match[3])


def is_commit(text: str) -> bool:
    """Return whether a text is the hash of a commit."""
    return _COMMIT.fullmatch(text) is not None


def dataset_folder(repository: str) -> Path:
    """Return the directory of a dataset's downloaded commits, in huggingface_hub's cache of other libraries' files."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "srcfast" / "datasets" / repository.replace("/", "--")


def repository_folder(name: HubName) -> Path:
    """Return where huggingface_hub's cache has a model."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.repository.replace('/', '--')}"


def reference_file(name: HubName) -> Path:
    """Return the file that holds the commit of a branch or tag when it was last downloaded."""
    if name.kind == "dataset":
        return dataset_folder(name.repository) / "refs" / quote(name.revision, safe="")
    return repository_folder(name) / "refs" / name.revision


def cached_commit(name: HubName) -> str | None:
    """Return the commit of a name by the cache alone, None where the branch or tag was not downloaded."""
    if name.is_pinned:
        return name.revision
    try:
        text = reference_file(name).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if is_commit(text) else None


def cached_directory(name: HubName) -> Path | None:
    """Return the directory of what was downloaded of a repository, None where there is nothing."""
    if (commit := cached_commit(name)) is None:
        return None
    if name.kind == "dataset":
        directory = dataset_folder(name.repository) / commit
    else:
        directory = repository_folder(name) / "snapshots" / commit
    return directory if directory.is_dir() else None


def local_model(path: str | Path) -> Path:
    """Return the directory of a checkpoint or an adapter: of a name that of its download, else the path as it is."""
    name = model_name(str(path))
    directory = None if name is None else cached_directory(name)
    return Path(path) if directory is None else directory


def local_data(path: str) -> str:
    """Return the path, or glob, of a dataset's file: of a name that of its download, else the path as it is."""
    name = dataset_name(path)
    directory = None if name is None else cached_directory(name)
    return path if name is None or directory is None else str(directory / name.file)


def name_of(directory: str | Path) -> HubName | None:
    """Return which model a directory is the download of; None for any other directory."""
    match = _SNAPSHOT.fullmatch("/".join(Path(directory).parts[-3:]))
    return None if match is None else HubName("model", f"{match[1]}/{match[2]}", match[3])


def shown_model(directory: str | Path) -> str:
    """Return what results call a model: its name at a commit where it was downloaded, else its path."""
    name = name_of(directory)
    return str(directory) if name is None else name.text
