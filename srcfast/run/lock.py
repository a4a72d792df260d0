"""An exclusive lock on an output directory, so that no two processes write to it."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import is_temporary, naming, remove_temporary
from srcfast.errors import SrcfastError


@contextmanager
def exclusive_lock(directory: Path, *, whole: bool = False) -> Iterator[None]:
    """Hold the lock of an output directory while the body runs; rank 0 holds it for all ranks.

    Args:
        directory, whole: see `lock_directory`.

    Raises:
        SrcfastError: another process holds the lock, or the directory can't be written.
    """
    # Here, so that commands that need no PyTorch can lock a directory.
    from srcfast import distributed

    with ExitStack() as lock:
        distributed.run_on_rank_zero(lambda: lock.enter_context(lock_directory(directory, whole=whole)))
        yield


@contextmanager
def lock_directory(directory: Path, *, whole: bool = False) -> Iterator[None]:
    """Hold the lock of an output directory while the body runs, in this process alone; see `exclusive_lock`.

    Temporary files of killed processes (`.name.PID.tmp`) are removed first.

    Args:
        directory: created if it is missing.
        whole: remove temporary files at any depth, as in a run's directory; else only those in the directory and in
            `checkpoint/`, for other directories below it may be another process's.

    Raises:
        SrcfastError: another process holds the lock, or the directory can't be written.
    """
    with _lock(directory):  # closing the file releases the lock; the kernel does so, too, when the process is killed
        patterns = ("**/.*.tmp",) if whole else (".*.tmp", "checkpoint/.*.tmp")
        for path in [path for pattern in patterns for path in directory.glob(pattern)]:
            if is_temporary(path):
                remove_temporary(path)
        yield


def _lock(directory: Path) -> Any:
    """Open and lock the lock file.

    The lock is a POSIX record lock, which forked worker processes don't inherit. So none of them holds it after this process
    has ended.
    """
    file = directory / ".lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Never through a link, which somebody may have planted: the holder's name is written into the file.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        opened = open(descriptor, "a+", encoding="utf-8")  # noqa: SIM115  (closed by the caller)
    except OSError as error:
        found = f"{file.name}, which is a link" if file.is_symlink() else error.strerror or error
        raise SrcfastError(
            f"{directory}: expected a directory that can be written, found {found}. "
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
        with suppress(OSError):  # close tries once more to write what is buffered
            opened.close()
        raise
    return opened
