"""The smallest calibration that goes through every stage, runs of it that a fault befalls, and what must come out of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SETTINGS = """
name: small
quiet: true
threads: 1
iterations: 1
model: {path: embedded}
scorer: {path: embedded}
data:
  train:
    - {name: world, format: world, split: train, limit: 32, use: [rationale]}
    - {name: world-fresh, format: world, split: train, seed: 1, limit: 6, use: [calibration]}
  evaluation:
    - {name: world, format: world, split: test, limit: 3}
lora: {r: 8, alpha: 16}
rationale: {samples: 24, epochs: 6, micro_batch_size: 4, gradient_accumulation_steps: 1, learning_rate: 3.0e-3}
candidates: {samples: 6, num_candidates: 3, max_sentence_tokens: 24, max_new_tokens: 96, batch_size: 6}
curation: {min_margin: 0.0, min_confidence: 0.0, min_rating: 0.0}
dpo: {epochs: 2, micro_batch_size: 1, gradient_accumulation_steps: 1, rehearsal_weight: 0.0}
evaluation: {max_new_tokens: 48, batch_size: 3, bootstrap_resamples: 100, headroom_samples: 2}
checkpoint: {steps: 4}
"""
STAGES = (
    "base/evaluation",
    "rationale",
    "rationale/evaluation",
    *(f"iteration-1/{stage}" for stage in ("candidates", "headroom", "scores", "preferences", "dpo", "evaluation")),
)
ADAPTERS = ("rationale/adapter", "iteration-1/adapter")
# Of time and memory, which no two runs have in common.
NOT_COMPARED = (
    "seconds",
    "finished",
    "tokens_per_second",
    "mfu",
    "memory",
    "peak_rss_bytes",
    "peak_memory_bytes",
    "tokens",
    "sha256",  # of a manifest entry, its times with it
)
NOT_COMPARED_FILES = ("environment.json", "summary.json", "report/index.html", ".lock")


def write_study(folder: Path, arms: dict[str, Any], **values: Any) -> Path:
    """Write a study of the smallest calibration, its runs in `folder`/small; values: further keys of the study."""
    settings = yaml.safe_load(SETTINGS)
    del settings["name"]
    settings["seed"] = "{seed}"
    tree = {"name": "small", "output": str(folder), "settings": settings, "arms": arms} | values
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return file


class Server:
    """The process that forks the attempts, see `attempts_server`.

    Args:
        folder: of the settings' file.
        inside: words before the command that starts it, of a program that it then runs in.
        program: the server's module in `helpers`.
    """

    def __init__(self, folder: Path, inside: Sequence[str] = (), program: str = "attempts_server") -> None:
        self.config = folder / "small.yaml"
        self.config.write_text(SETTINGS, encoding="utf-8")
        tests = str(Path(__file__).parents[1])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": tests}
        self.process = subprocess.Popen(
            [*inside, sys.executable, "-m", f"helpers.{program}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self,
        output: Path,
        fault: dict[str, Any] | None = None,
        log: Path | None = None,
        words: Sequence[str] = (),
        **more: Any,
    ) -> Attempt:
        """`srcfast calibrate` once, into this directory.

        Args:
            output: the run lies in its `small/`.
            fault: see `attempts_server.Faults`.
            log: of what is said, by all attempts; default: in `output`.
            words: more of the command line.
            more: for other programs' servers.
        """
        output.mkdir(parents=True, exist_ok=True)
        log = log or output / "log.txt"
        before = log.stat().st_size if log.is_file() else 0
        inside = {"inside": str(output / "small")}
        request = {"words": ["calibrate", str(self.config), f"output={output}", *words], "log": str(log)}
        request |= {"fault": (fault or {}) | inside, **more}
        answer = self.ask(request)
        return Attempt(answer["status"], answer["points"], log.read_text(encoding="utf-8")[before:])

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The program's answer to a request."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=600)


@dataclass(frozen=True)
class Attempt:
    """How one process ended: its exit status (negative: the signal), at which point of writing, and what it said."""

    status: int
    points: list[str]
    said: str


def finished_stages(run: Path) -> list[str]:
    file = run / "manifest.json"
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in NOT_COMPARED}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def result_of(run: Path, output: Path | None = None) -> dict[str, Any]:
    """All files of a run by name: their bytes, of manifest and metrics what is no measurement; paths made alike.

    `output`: the directory as the run was told of it, where it is seen from elsewhere or was moved.
    """
    found: dict[str, Any] = {}
    for file in sorted(run.rglob("*")):
        name = str(file.relative_to(run))
        if file.is_dir():
            continue
        if name in NOT_COMPARED_FILES:
            found[name] = "there"
            continue
        data = file.read_bytes().replace(str(output or run.parent).encode(), b"OUTPUT")
        if name == "manifest.json":
            found[name] = without_times(json.loads(data))
        elif name == "metrics.jsonl":
            found[name] = [without_times(json.loads(line)) for line in data.splitlines()]
        else:
            found[name] = data
    return found


def assert_same(run: Path, truth: dict[str, Any], output: Path | None = None) -> None:
    """The run's files are those of the run that nothing befell: none more, none less, none other."""
    own = result_of(run, output)
    assert sorted(own) == sorted(truth)
    assert [name for name in own if own[name] != truth[name]] == []
