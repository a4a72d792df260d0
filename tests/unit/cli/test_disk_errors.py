"""Errors of the disk end a command with what helps, not with a trace."""

from __future__ import annotations

import errno
import os

import pytest

from srcfast.cli.disk_errors import DISK_FIXES, report_disk_errors
from srcfast.errors import SrcfastError


@pytest.mark.parametrize("code", DISK_FIXES, ids=errno.errorcode.get)
def test_each_names_the_file_and_the_way_out(code: int) -> None:
    with (
        pytest.raises(
            SrcfastError, match=rf"run/metrics\.jsonl: {os.strerror(code)}.*Finished work is saved\. Fix: \w+"
        ),
        report_disk_errors(),
    ):
        raise OSError(code, os.strerror(code), "run/metrics.jsonl")


def test_a_missing_file_is_no_error_of_the_disk() -> None:
    """Readers name it themselves; where they don't, the trace is needed."""
    with pytest.raises(FileNotFoundError), report_disk_errors():
        raise FileNotFoundError(errno.ENOENT, "none", "x")
