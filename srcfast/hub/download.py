"""Download repositories of the Hub at a commit, by huggingface_hub: safetensors, JSON and text, never pickles or code."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from srcfast.data.jsonl import write_text
from srcfast.errors import SrcfastError
from srcfast.hub.names import HubName, cached_commit, dataset_folder, reference_file, repository_folder

Result = TypeVar("Result")

SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja")  # of a checkpoint's and an adapter's files
# Other libraries' copies of the weights, and folders, which hold other forms of the model.
LEFT_OUT = ("consolidated*.safetensors", "*/*")
# Of a dataset's folder: images, and what `datasets` saves.
IN_FOLDERS = tuple(
    f"*.{suffix}"
    for of in ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "arrow", "json")
    for suffix in (of, of.upper())
)
POLL = 0.2  # seconds between two looks at a download
CONNECTION = "see to the network and run the same command again, or set HF_HUB_OFFLINE=1 to use what the cache has"
FIXES = {
    401: "set HF_TOKEN to a token that may do this, and correct the name",
    403: "accept the repository's terms on its page, and set HF_TOKEN to a token that may do this",
    404: "correct the name and the revision; for a private repository set HF_TOKEN",
    429: "wait, and run the same command again; with HF_TOKEN the Hub allows more requests",
}


def endpoint() -> str:
    """Return the address of the Hub: that of HF_ENDPOINT, by default huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def token() -> str | bool:
    """Return the token of HF_TOKEN, False without one: files that hold a token are not read."""
    return os.environ.get("HF_TOKEN", "").strip() or False


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids all requests."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def fetch(name: HubName, commit: str, quiet: bool = False, weights: bool = True) -> None:
    """Download what a command reads of a repository at a commit, unless the cache has it.

    Args:
        name: of a model or an adapter, or of a dataset's file, glob or folder of images.
        commit: that its revision has, see `commit_of`.
        quiet: show no progress.
        weights: whether a model's weights are needed, too.

    Raises:
        SrcfastError: there is no such repository, revision or file, it may not be read, or the Hub can't be reached.
    """
    if name.kind == "model":
        suffixes = [suffix for suffix in SUFFIXES if weights or suffix != ".safetensors"]
        _snapshot(name, commit, quiet, [f"*{suffix}" for suffix in suffixes], list(LEFT_OUT), None)
        _note_commit(name, commit)
        return
    folder = name.file.rstrip("/")
    directory = dataset_folder(name.repository) / commit
    # Files, no links into a cache: images have to lie below their root.
    _snapshot(name, commit, quiet, [folder, *(f"{folder}/{files}" for files in IN_FOLDERS)], [], directory)
    _note_commit(name, commit)
    if not any(directory.glob(folder)):
        raise SrcfastError(
            f"{name.text}: expected a file of the repository, or a folder of images, found none. Fix: correct the path"
        )


def _note_commit(name: HubName, commit: str) -> None:
    """Write to the cache which commit a branch has now, for commands without a network."""
    if not name.is_pinned and not is_offline():
        write_text(reference_file(name), commit)


def commit_of(name: HubName) -> str:
    """Return the commit of a name: the Hub says it, or without a network the cache does. Raises SrcfastError."""
    if name.is_pinned:
        return name.revision
    if not is_offline():
        info = asked(name.label, lambda: _api().repo_info(name.repository, repo_type=name.kind, revision=name.revision))
        return str(info.sha)
    if (commit := cached_commit(name)) is None:
        raise SrcfastError(
            f"{name.label}: expected it in the cache, since HF_HUB_OFFLINE is set, found no such revision. "
            "Fix: download it without HF_HUB_OFFLINE, or name a local directory"
        )
    return commit


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=token())


def _snapshot(
    name: HubName, commit: str, quiet: bool, allowed: list[str], ignored: list[str], directory: Path | None
) -> None:
    """Download the files of one commit, to a directory or else into huggingface_hub's cache. Raises SrcfastError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import tqdm

    stopped = threading.Event()

    class Progress(tqdm):
        """Progress bars that end the download where the command was stopped."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | ({"disable": True} if quiet else {})))

        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise RuntimeError("the command was stopped")
            return super().update(n)

    options: dict[str, Any] = {
        "repo_type": name.kind,
        "allow_patterns": allowed,
        "ignore_patterns": ignored or None,
        "endpoint": endpoint(),
        "token": token(),
        "tqdm_class": Progress,
        "local_dir": directory,
    }
    if (_trees(name, directory) / f"{commit}.json").is_file():  # the list of the commit's files: no request is needed
        with suppress(LocalEntryNotFoundError):
            snapshot_download(name.repository, revision=commit, local_files_only=True, **options)
            return
    work = lambda: snapshot_download(name.repository, revision=commit, **options)  # noqa: E731
    asked(name.label, lambda: _with_heartbeat(work, stopped))


def _trees(name: HubName, directory: Path | None) -> Path:
    """Return where huggingface_hub stores the lists of commits' files."""
    return (repository_folder(name) if directory is None else directory / ".cache" / "huggingface") / "trees"


def _with_heartbeat(work: Callable[[], Result], stopped: threading.Event) -> Result:
    """Run a download in a thread; meanwhile the ranks that wait hear of this one, and a signal stops it at once."""
    from srcfast import distributed

    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL)
            distributed.heartbeat()
    except BaseException:
        stopped.set()
        raise
    if errors:
        raise errors[0]
    return results[0]


def asked(label: str, work: Callable[[], Result]) -> Result:
    """Return what requests to the Hub give; turn their errors into a SrcfastError with status and fix, without a server's text.

    Raises:
        SrcfastError: a request failed.
        OSError: an error of the disk.
    """
    try:
        return work()
    except SrcfastError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
            raise
        raise _error(label, error) from error


def _error(label: str, error: Exception) -> SrcfastError:
    """Describe a failed request, whose own text may quote headers or what a server makes of them."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    statuses = [getattr(getattr(each, "response", None), "status_code", None) for each in chain]
    status = next((number for number in statuses if number is not None), None)
    if isinstance(error, HFValidationError):
        return SrcfastError(f"{label}: expected owner/name, found no name that the Hub allows. Fix: correct the name")
    if is_offline() and isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        fix = "run the command once without HF_HUB_OFFLINE, or name a local directory"
        return SrcfastError(
            f"{label}: expected all files in the cache, since HF_HUB_OFFLINE is set, found not all. Fix: {fix}"
        )
    if status is not None:
        fix = FIXES.get(status, "wait, and run the same command again; what was transferred is not repeated")
        return SrcfastError(f"{label}: expected a reply of {endpoint()}, found status {status}. Fix: {fix}")
    reason = type(chain[-1]).__name__
    return SrcfastError(f"{label}: expected a whole reply of {endpoint()}, found {reason}. Fix: {CONNECTION}")
