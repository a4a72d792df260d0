"""First contact, the demo's whole calibration on the GPU in bf16, run as the command that users run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from srcfast_benchmarks.contact_part import Case, Cases
from srcfast_benchmarks.contact_results import ROOT, TAIL, Context

WORDS = ("model.device=cuda", "model.dtype=bfloat16", "scorer.dtype=float16", "quiet=true")
TINY = (
    "iterations=1",
    "data.train=[{name: world, format: world, split: train, limit: 64}]",
    "data.evaluation=[{name: world, format: world, split: test, limit: 4}]",
    "rationale={samples: 64, epochs: 3, micro_batch_size: 8}",
    "candidates={samples: 8, num_candidates: 4, max_new_tokens: 96, batch_size: 8}",
    "curation={min_margin: 0.0, min_confidence: 0.0, min_rating: 0.0}",
    "dpo={epochs: 1, micro_batch_size: 4}",
    "evaluation={max_new_tokens: 96, batch_size: 4, headroom_samples: 2, bootstrap_resamples: 100}",
)
STORED = ("model", "dataset", "split", "n", "accuracy", "accuracy_ci95", "alignment", "alignment_ci95")
ON_A_CPU = ROOT / "benchmarks" / "results" / "demo_calibration.json"


def cases(context: Context) -> Cases:
    return {"bf16": calibrate}


def calibrate(case: Case) -> dict[str, Any]:
    """Run the command, and store the stages as they finish. Raises RuntimeError where it fails."""
    context = case.context
    words = [*WORDS, *(TINY if context.tiny else ()), f"output={context.work / 'demo'}"]
    command = [*python(context), "-m", "srcfast", "calibrate", "srcfast/world/demo.yaml", *words]
    run, log, finished = context.work / "demo" / "demo", context.work / "demo-command.log", 0
    began = time.perf_counter()
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.5)
            if len(stages := finished_stages(run)) > finished:
                finished = len(stages)
                case.store(stages=stages)
    seconds = time.perf_counter() - began
    output = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
    case.store(words=words, exit_status=process.returncode, stages=finished_stages(run), output=output)
    if process.returncode:
        last = output.strip().rpartition("\n")[2]
        raise RuntimeError(f"srcfast calibrate ended with status {process.returncode}: {last}")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return outcome(summary) | {
        "wall_seconds": seconds,
        "on_a_cpu": None if context.tiny else on_a_cpu(),
    }


def python(context: Context) -> list[str]:
    """The interpreter, with the simulated device where the run is simulated."""
    return [sys.executable, *([str(ROOT / "tests" / "simulated_cuda")] if context.simulated else [])]


def finished_stages(run: Path) -> list[dict[str, Any]]:
    """Names, seconds and tokens of the stages that the run's manifest lists."""
    try:
        entries = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [{"name": name, "seconds": entry["seconds"], "tokens": entry["tokens"]} for name, entry in entries.items()]


def outcome(summary: dict[str, Any]) -> dict[str, Any]:
    """The stages and evaluations of a run's summary, without details."""
    evaluations = [{key: row.get(key) for key in STORED} for row in summary["evaluations"]]
    return {"stages": summary["stages"], "evaluations": evaluations}


def on_a_cpu() -> dict[str, Any] | None:
    """The demo's committed run on a CPU in fp32, for comparison."""
    if not ON_A_CPU.is_file():
        return None
    stored = json.loads(ON_A_CPU.read_text(encoding="utf-8"))
    return outcome(stored) | {"device": stored["device"], "wall_seconds": stored["wall_seconds"]}
