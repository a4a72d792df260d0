"""How long does the demo take, and how much memory?

    python benchmarks/demo.py

Runs the commands of `make demo` from nothing, each in a process, and writes `benchmarks/results/demo.json`; then the calibration
of `srcfast/world/demo.yaml` alone, and writes `benchmarks/results/demo_calibration.json`, which `first_contact.py` reads.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import write_json
from srcfast.run.environment import environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORLD = "srcfast/world"
COMMANDS = (
    f"rationale {WORLD}/demo.yaml --output runs/demo-teacher",
    f"teach {WORLD}/from_answers.yaml --adapter runs/demo-teacher --output runs/demo-taught.jsonl",
    f"scorer {WORLD}/from_answers.yaml --scorer embedded --output runs/demo-r-scorer",
    f"calibrate {WORLD}/from_answers.yaml",
)
STORED = ("seconds", "peak_rss_bytes", "stages", "evaluations")


def main() -> None:
    """Both from nothing, with the machine to themselves."""
    measure(COMMANDS, RESULTS / "demo.json")
    measure([f"calibrate {WORLD}/demo.yaml"], RESULTS / "demo_calibration.json")


def measure(commands: Sequence[str], output: Path) -> None:
    """Run the commands in an empty folder, one after the other, and write what they took and what came of the run."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for words in commands:
            arguments = words.replace(WORLD, str(ROOT / WORLD)).split()
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "srcfast", *arguments], cwd=folder, check=True)
            seconds[f"srcfast {words}"] = time.perf_counter() - start
        results = {
            path.parent.name: json.loads(path.read_text(encoding="utf-8"))
            for name in ("funnel", "summary")
            for path in Path(folder).glob(f"runs/*/{name}.json")
        }
    result: dict[str, Any] = {"command": "python benchmarks/demo.py"}
    result |= {"device": environment() | {"platform": platform.platform()}}
    result |= {"wall_seconds": sum(seconds.values()), "commands": seconds}
    if "demo-r-scorer" in results:
        result |= {"taught": results["demo-taught.jsonl.asked"], "r_scorer": results["demo-r-scorer"]["held_out"]}
    result |= {key: results["demo"][key] for key in STORED}
    write_json(output, result)
    print(f"{output.name}: {result['wall_seconds']:.0f} s, {results['demo']['peak_rss_bytes'] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
