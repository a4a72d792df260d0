"""Turn errors of reading and writing files into errors that say what helps."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from srcfast.errors import SrcfastError

ANOTHER_PATH = "name another path, or see to what is there"
REPAIR = "repair the file system; the same command continues"
# What helps against errors of reading and writing files.
DISK_FIXES = {
    errno.ENOSPC: "free disk space; the same command continues",
    errno.EDQUOT: "free disk space, or have the quota raised; the same command continues",
    errno.EROFS: "name a path on a file system that can be written; the same command continues",
    errno.EIO: REPAIR,
    errno.ENODEV: REPAIR,
    errno.ENXIO: REPAIR,
    errno.ESTALE: REPAIR,
    errno.EFBIG: "see to `ulimit -f`, or take another file system: this one has no files so large; the same command continues",
    errno.EMFILE: "raise `ulimit -n`; the same command continues",
    errno.ENFILE: "close other programs' files; the same command continues",
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP), ANOTHER_PATH),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EBUSY, errno.ENOTEMPTY, errno.EXDEV), ANOTHER_PATH),
    **dict.fromkeys((errno.ETXTBSY, errno.EOPNOTSUPP), ANOTHER_PATH),
}


@contextmanager
def report_disk_errors() -> Iterator[None]:
    """Turn errors of reading and writing files, and failures of libraries in Rust, into a SrcfastError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FIXES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        fix = DISK_FIXES[error.errno]
        raise SrcfastError(f"{where}{error.strerror}. Finished work is saved. Fix: {fix}") from error
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":  # a panic of a library in Rust is no Exception
            raise
        fix = "Fix: take another tokenizer.json, if its patterns fail"
        raise SrcfastError(f"a library of the checkpoint's files has failed: {error}. {fix}") from error
