"""The result file of one part of first contact, rewritten after every event, so that a killed process loses one case at most.

The file is JSON: the part, whether it was simulated, the shapes, the commit and a hash of the sources, the machine, and `cases`
by name. A case has

    status   under_way, done, failed, left_out (something that it needs is not installed), or killed (it gave no result
             within its limit, or its process died)
    seconds  wall-clock
    ...      what it measured; error and traceback where it failed

`status` of the file is complete once every planned case has ended, else partial. `processes` lists how each process of the part
ended, with the last lines of its output unless all went well.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import write_json

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("srcfast", "kernels", "csrc", "benchmarks", "tests")  # folders that a result depends on
ENDINGS = (".py", ".yaml", ".cpp", ".h", ".cu")
TAIL = 8000  # characters of a process's output that are stored
ENDED = ("done", "failed", "left_out", "killed")


@dataclass(frozen=True)
class Context:
    """What every part is given.

    Attributes:
        shapes: "full", or "tiny" for a simulated device.
        simulated: whether the device is that of tests/simulated_cuda.
        work: folder for checkpoints and runs, shared by all parts of a run.
        until: `time.time()` at which the part is killed.
    """

    shapes: str
    simulated: bool
    work: Path
    until: float

    @property
    def tiny(self) -> bool:
        return self.shapes == "tiny"

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"work": str(self.work)})

    @classmethod
    def from_json(cls, text: str) -> Context:
        values = json.loads(text)
        return cls(**(values | {"work": Path(values["work"])}))


class Result:
    """One part's file. Its contents are taken over if `head` (part, shapes, sources, ...) is the same but for the commit."""

    def __init__(self, file: Path, head: dict[str, Any]) -> None:
        self.file, self._lock = file, threading.RLock()
        stored = read(file)
        same = stored is not None and all(stored.get(key) == value for key, value in head.items() if key != "commit")
        self.data: dict[str, Any] = (
            stored if stored and same else head | {"status": "partial", "cases": {}, "processes": []}
        )
        self.data.setdefault("started", datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        return self.data["cases"]

    def ended(self, case: str) -> bool:
        return self.cases.get(case, {}).get("status") in ENDED

    def under_way(self) -> list[str]:
        return [name for name, values in self.cases.items() if values["status"] == "under_way"]

    def begin(self, case: str) -> None:
        with self._lock:
            self.cases[case] = {"status": "under_way", "since": time.time()}
            self.write()

    def update(self, case: str, **values: Any) -> None:
        """Store what a case has measured so far."""
        with self._lock:
            self.cases[case] |= values
            self.write()

    def end(self, case: str, status: str, **values: Any) -> None:
        """Store how a case ended, with what it has stored before."""
        with self._lock:
            before = self.cases.get(case, {})
            seconds = time.time() - before.pop("since", time.time())
            self.cases[case] = {"status": status, "seconds": seconds} | before | values | {"status": status}
            self.write()

    def fail(self, case: str, error: BaseException) -> None:
        trace = "".join(traceback.format_exception(error))
        self.end(case, "failed", error=f"{type(error).__name__}: {error}"[:1000], traceback=trace[-TAIL:])

    def add_process(self, **values: Any) -> None:
        with self._lock:
            self.data["processes"].append(values)
            self.write()

    def set(self, **values: Any) -> None:
        with self._lock:
            self.data |= values
            self.write()

    def write(self) -> None:
        write_json(self.file, plain(self.data))


def read(file: Path) -> dict[str, Any] | None:
    """A result file's contents; None where there is no such file, or it is not a whole one."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) and "cases" in stored else None


def plain(value: Any) -> Any:
    """The value as JSON can hold it: a number that is not finite becomes its name, an unknown object its text."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)


def sources_hash(root: Path = ROOT) -> str:
    """Hash of all sources that a result depends on, 16 hex digits."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in ENDINGS and file.is_file():
                digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def commit_of(root: Path = ROOT) -> str | None:
    """The work tree's commit, with `-dirty` where tracked files differ from it; None outside of a git work tree."""
    if not (root / ".git").exists():
        return None
    outputs = []
    status = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    for words in (("rev-parse", "--verify", "HEAD"), status):
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        if done.returncode:
            return None
        outputs.append(done.stdout.strip())
    return outputs[0] + ("-dirty" if outputs[1] else "")
