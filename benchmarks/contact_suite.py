"""First contact, the tests marked `gpu`: a folder of tests, or a share of a large one, is a case, and several run side by side.

A test that hangs, crashes its process or loses the device counts as one failure: another process runs the tests behind it. Tests
marked `timing` run last and alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from srcfast_benchmarks.contact_part import Case, Cases
from srcfast_benchmarks.contact_pytest import MESSAGE, read_log
from srcfast_benchmarks.contact_results import ROOT, TAIL, Context

GPU, TIMING = re.compile(r"\bmark\.gpu\b"), re.compile(r"\bmark\.timing\b")
SHARES = {"kernels": 4, "forest": 3}  # folders with many tests, or many kernels to compile
MOST_PROCESSES = 6  # for one case
SILENCE, SIMULATED_SILENCE = 60.0, 600.0  # seconds without an event in the log after which a test counts as hung
TINY = {
    "generation": ["tests/unit/generation/test_slot_cache.py"],
    "memory": ["tests/unit/memory/test_vision_offload.py"],
}
COMPLETE = (0, 5)  # exit statuses of pytest: all passed, no test left

_running: set[str] = set()  # names of cases
_changed = threading.Condition()


def at_once(context: Context) -> int:
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def cases(context: Context) -> Cases:
    folders = TINY if context.tiny else files_with(GPU)
    planned: Cases = {}
    for folder, files in sorted(folders.items(), key=lambda item: -SHARES.get(item[0], 1)):
        shares = 1 if context.tiny else SHARES.get(folder, 1)
        for number in range(1, shares + 1):
            name = folder if shares == 1 else f"{folder} {number}/{shares}"
            planned[name] = partial(run_tests, files, "gpu and not timing", f"{number}/{shares}")
    timed = [] if context.simulated else [file for files in files_with(TIMING).values() for file in files]
    if timed:
        planned["timing"] = partial(run_alone, timed)
    return planned


def files_with(mark: re.Pattern[str]) -> dict[str, list[str]]:
    """Test files that contain a marker, by their folder."""
    folders: dict[str, list[str]] = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        if mark.search(file.read_text(encoding="utf-8")):
            folders.setdefault(file.parent.name, []).append(str(file.relative_to(ROOT)))
    return folders


def run_alone(files: list[str], case: Case) -> dict[str, Any]:
    """Run the tests that time the device, once no other case is running. It is the last case, so none begins after it."""
    with _changed:
        _changed.wait_for(lambda: not _running)
    return run_tests(files, "gpu and timing", "1/1", case)


def run_tests(files: list[str], marks: str, share: str, case: Case) -> dict[str, Any]:
    """Run a case's tests in as many processes as it takes."""
    with _changed:
        _running.add(case.name)
    try:
        return _run_tests(files, marks, share, case)
    finally:
        with _changed:
            _running.discard(case.name)
            _changed.notify_all()


def _run_tests(files: list[str], marks: str, share: str, case: Case) -> dict[str, Any]:
    log = case.context.work / f"tests-{case.name.replace('/', '-')}.jsonl"
    processes: list[dict[str, Any]] = []
    for _ in range(MOST_PROCESSES):
        status, output = run_pytest(files, marks, share, log, case)
        processes.append({"exit": status})
        rows = read_log(log)
        if (crashed := unfinished(rows)) is not None:
            message = f"its process ended with exit status {status}\n{output[-MESSAGE:]}"
            row = {"id": crashed, "outcome": "crashed", "seconds": 0.0, "message": message}
            with open(log, "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(row) + "\n")
        elif status in COMPLETE or not (rows and "lost" in rows[-1]):
            if status not in COMPLETE:
                processes[-1]["output"] = output
            break
    return summary(log) | {"processes": processes}


def run_pytest(files: list[str], marks: str, share: str, log: Path, case: Case) -> tuple[int, str]:
    """Run one process of pytest, and end it where a test hangs. Returns its exit status and the last lines of its output."""
    options = ["-q", "--tb=short", "-p", "srcfast_benchmarks.contact_pytest", "-p", "no:cacheprovider"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {"OMP_NUM_THREADS": "2"} | inherited | {"FIRST_CONTACT_LOG": str(log), "FIRST_CONTACT_SHARE": share}
    silence = SIMULATED_SILENCE if case.context.simulated else SILENCE
    output = log.with_suffix(".log")
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-m", marks, *options, *files],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        size, changed = -1, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            now = log.stat().st_size if log.exists() else 0
            if now != size:
                size, changed = now, time.monotonic()
                case.store(**summary(log))
            elif time.monotonic() - changed > silence:
                end(process)
    return process.returncode, output.read_text(encoding="utf-8", errors="replace")[-TAIL:]


def end(process: subprocess.Popen[bytes]) -> None:
    """Abort a process, which makes Python print where it is, then kill it."""
    process.send_signal(signal.SIGABRT)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)


def unfinished(rows: list[dict[str, Any]]) -> str | None:
    """The test that has begun and has no outcome."""
    begun = next((row["begins"] for row in reversed(rows) if "begins" in row), None)
    return begun if begun is not None and all(row.get("id") != begun for row in rows) else None


def summary(log: Path) -> dict[str, Any]:
    """Counts by outcome; the failures; the reasons of skips; the slowest tests."""
    rows = read_log(log)
    ended = {
        row["id"]: row for row in rows if "id" in row
    }  # the last outcome of a test that fails in its teardown, too
    slowest = sorted(ended.values(), key=lambda row: -row["seconds"])[:5]
    return {
        "collected": max((row["collected"] for row in rows if "collected" in row), default=0),
        "counts": dict(Counter(row["outcome"] for row in ended.values())),
        "failures": [row for row in ended.values() if row["outcome"] in ("failed", "crashed")],
        "skipped": dict(Counter(row["message"][-200:] for row in ended.values() if row["outcome"] == "skipped")),
        "slowest": [{"id": row["id"], "seconds": row["seconds"]} for row in slowest],
    }
