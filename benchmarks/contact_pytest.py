"""A pytest plugin that stores each test's outcome at once: `-p srcfast_benchmarks.contact_pytest`.

The environment variable FIRST_CONTACT_LOG names a file of JSON lines: {"begins": id}, {"id", "outcome", "seconds", "message"}.
Tests whose outcome is in it are not run again. FIRST_CONTACT_SHARE, such as `2/4`, selects every fourth test from the second on.
After a failure the plugin checks that the device still answers; if not, it writes {"lost": reason} and ends the session, for the
remaining tests need a new process.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

MESSAGE = 3000  # characters of a failure that are stored


def pytest_configure(config: pytest.Config) -> None:
    log = Log(Path(os.environ["FIRST_CONTACT_LOG"]), os.environ.get("FIRST_CONTACT_SHARE", "1/1"))
    config.pluginmanager.register(log)


class Log:
    """The hooks of one session."""

    def __init__(self, file: Path, share: str) -> None:
        self.file = file
        self.number, self.shares = map(int, share.split("/"))
        self.session: pytest.Session | None = None

    def write(self, **row: Any) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @pytest.hookimpl(trylast=True)  # after the selection by markers
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        self.session = session
        share = items[self.number - 1 :: self.shares]
        ended = {row["id"] for row in read_log(self.file) if "id" in row}
        self.write(collected=len(share))
        items[:] = [item for item in share if item.nodeid not in ended]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(begins=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        message = "" if report.passed else report.longreprtext[-MESSAGE:]
        self.write(id=report.nodeid, outcome=report.outcome, seconds=report.duration, message=message)
        if report.failed and self.session is not None and (reason := why_lost()):
            self.write(lost=reason)
            self.session.shouldstop = reason


def why_lost() -> str | None:
    """Why the device no longer answers this process; None if it does."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.ones(1, device="cuda").add(1).item()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return None


def read_log(file: Path) -> list[dict[str, Any]]:
    """The file's rows, without a line that a killed process left half-written."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
