"""How long does the demo take, and how much memory?

    python benchmarks/demo.py

Runs `srcfast/world/demo.yaml` as `make demo` does, from nothing, in a process of its own; writes `benchmarks/results/demo.json`.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from srcfast.data.jsonl import write_json
from srcfast.run.environment import environment

ROOT = Path(__file__).parents[1]
KEPT = ("seconds", "peak_rss_bytes", "stages", "evaluations")


def main() -> None:
    """One run from nothing, with the machine to itself."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "srcfast", "calibrate", "srcfast/world/demo.yaml", f"output={output}"]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True)
        wall_seconds = time.perf_counter() - start
        summary = json.loads((Path(output) / "demo" / "summary.json").read_text(encoding="utf-8"))
    result = {"command": "python benchmarks/demo.py", "device": environment() | {"platform": platform.platform()}}
    result |= {"wall_seconds": wall_seconds} | {key: summary[key] for key in KEPT}
    write_json(ROOT / "benchmarks" / "results" / "demo.json", result)
    print(f"{wall_seconds:.0f} s, {summary['peak_rss_bytes'] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
