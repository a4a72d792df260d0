"""The first ten minutes on a GPU: `python -m srcfast_benchmarks.first_contact`.

Parts run in turn, the most telling first, each in a process of its own with a time limit. A part that fails, hangs or dies is
stored as such and never ends the run. Each part has a JSON file in `benchmarks/results/gpu/` with device, driver, versions and
commit, rewritten after every case. A part that is complete for these sources is not run again; of a part that was stopped, the
cases that are left are run. Parts that no longer fit into the time are skipped by name. At the end `README.md` beside the files
says what fell short of its target, what was not measured, and every ratio.

This process imports the standard library and modules that need no more, so that whatever is wrong with the installation ends in
a result file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.memory.allocator import allocator_variables
from srcfast_benchmarks.contact_page import write_page
from srcfast_benchmarks.contact_part import LOST
from srcfast_benchmarks.contact_results import ROOT, TAIL, Context, Result, commit_of, read, sources_hash

REAL, SIMULATED = ROOT / "benchmarks" / "results" / "gpu", ROOT / "build" / "first_contact"
LAUNCHER = ROOT / "tests" / "simulated_cuda"
RESERVE = 8.0  # seconds of the whole that are left for the page
GRACE = 5.0  # seconds for a process to print where it is before it is killed
MOST_PROCESSES = 5  # of a part
PROGRESS = 15.0  # seconds between two lines of progress
SIMULATED_FACTOR = 10.0  # how much longer a simulated part may take
# Set for every part. SRCFAST_KERNELS: Triton's interpreter takes seconds a launch, so the kernels' part alone uses it.
SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
SIMULATED_SURROUNDINGS = {"SIMULATED_CUDA": "1", "SRCFAST_KERNELS": "torch", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Part:
    """A part of first contact.

    Attributes:
        module: see `contact_part`.
        about: what it measures, for the page.
        limit: seconds after which it is killed.
        case_limit: seconds after which a case counts as hung.
        least: seconds that must be left for it to begin.
    """

    name: str
    module: str
    about: str
    limit: float
    case_limit: float
    least: float = 20.0


PARTS = (
    Part("demo", "srcfast_benchmarks.contact_demo", "The demo's calibration in bf16", 130, 130, 30),
    Part("gpu_tests", "srcfast_benchmarks.contact_suite", "Tests marked gpu, by folder", 110, 110, 30),
    Part("dpo_steps", "srcfast_benchmarks.contact_training", "DPO steps of a 7B LLaVA-1.5", 130, 60, 30),
    Part("beam_search", "srcfast_benchmarks.contact_decoding", "Beam search of 4 samples by 24 rows", 75, 45, 25),
    Part("drift", "srcfast_benchmarks.contact_drift", "One log-probability by different methods", 45, 40, 25),
    Part("judging", "srcfast_benchmarks.contact_judging", "One judging forest of a 1.5B R-Scorer", 30, 30, 15),
    Part("kernels", "srcfast_benchmarks.contact_kernels", "Each operation against its peers", 75, 30, 15),
    Part("peers", "srcfast_benchmarks.contact_peers", "The same DPO steps by TRL, PEFT and bitsandbytes", 120, 90, 45),
)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns 1 where there is no CUDA device, else 0: what failed is in the files and on the page."""
    parser = argparse.ArgumentParser(prog="first_contact", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together (10)")
    parser.add_argument("--output", type=Path, help="folder of the result files (benchmarks/results/gpu)")
    parser.add_argument("--parts", help=f"some of {','.join(part.name for part in PARTS)}")
    parser.add_argument("--commit", help="of the sources, where they lie outside of a git work tree")
    parser.add_argument("--shapes", choices=("full", "tiny"), default="full")
    parser.add_argument("--simulated", action="store_true", help="on the device of tests/simulated_cuda")
    options = parser.parse_args(arguments)
    names = options.parts.split(",") if options.parts else [part.name for part in PARTS]
    if unknown := set(names) - {part.name for part in PARTS}:
        parser.error(f"--parts: expected some of {', '.join(part.name for part in PARTS)}, found {', '.join(unknown)}")
    output = options.output or (SIMULATED if options.simulated else REAL)
    if fault := why_mixed(output, options.simulated):
        parser.error(fault)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the part that runs is ended, too
    run = Run(output, options.minutes, options.shapes, options.simulated, options.commit)
    return run.run([part for part in PARTS if part.name in names])


def why_mixed(output: Path, simulated: bool) -> str | None:
    """Why results may not be written there; None if they may. No folder holds both real and simulated ones."""
    if simulated and output.resolve().is_relative_to(ROOT / "benchmarks"):
        return f"--output: expected a folder outside of benchmarks/ for simulated results, found {output}"
    for file in sorted(output.glob("*.json")):
        stored = read(file)
        if stored is not None and stored.get("simulated") != simulated:
            kind = "simulated" if stored.get("simulated") else "real"
            return f"--output: expected a folder without {kind} results, found {file}. Fix: name another folder"
    return None


class Run:
    """Runs parts within a time."""

    def __init__(self, output: Path, minutes: float, shapes: str, simulated: bool, commit: str | None) -> None:
        self.output, self.shapes, self.simulated = output, shapes, simulated
        self.until = time.time() + 60.0 * minutes
        self.factor = SIMULATED_FACTOR if simulated else 1.0
        self.head = {
            "simulated": simulated,
            "shapes": shapes,
            "commit": commit or commit_of(),
            "sources": sources_hash(),
        }
        self.skipped: dict[str, str] = {}

    def left(self) -> float:
        """Seconds that parts may still take."""
        return self.until - RESERVE - time.time()

    def say(self, text: str) -> None:
        print(f"[{max(0.0, self.left()):5.0f} s left] {text}", flush=True)

    def run(self, parts: list[Part]) -> int:
        """Run the parts and write the page; see `main`."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # processes that are aborted leave no core files
        self.say(f"commit {self.head['commit']}, sources {self.head['sources']}, results in {self.output}")
        machine = self.machine()
        if machine.get("gpu") is None and "failed" not in machine:
            self.say(f"no CUDA device: torch {machine['torch']} sees none")
            return 1
        self.say(machine.get("failed") or f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}")
        try:
            with tempfile.TemporaryDirectory(prefix="first_contact-", ignore_cleanup_errors=True) as work:
                for part in parts:
                    self.part(part, machine, Path(work))
        finally:
            page = write_page(self.output, {part.name: part.about for part in PARTS}, self.skipped)
            self.say(f"the page: {page}")
        return 0

    def machine(self) -> dict[str, Any]:
        """What `contact_machine` prints, or {"failed": the last lines of its output}."""
        command = self.python("srcfast_benchmarks.contact_machine")
        options: dict[str, Any] = {"cwd": ROOT, "env": self.surroundings(), "capture_output": True, "text": True}
        try:
            done = subprocess.run(command, timeout=max(1.0, self.left()), check=False, **options)
        except subprocess.TimeoutExpired as error:
            return {"failed": str(error)}
        if done.returncode or not done.stdout.strip():
            return {"failed": (done.stdout + done.stderr)[-TAIL:]}
        return json.loads(done.stdout.strip().splitlines()[-1])

    def python(self, module: str, *arguments: str) -> list[str]:
        return [sys.executable, *([str(LAUNCHER)] if self.simulated else []), "-m", module, *arguments]

    def surroundings(self) -> dict[str, str]:
        given = os.environ | SURROUNDINGS | (SIMULATED_SURROUNDINGS if self.simulated else {})
        return given | allocator_variables(given)

    def result(self, part: Part) -> Result:
        return Result(self.output / f"{part.name}.json", {"part": part.name, "about": part.about} | self.head)

    def part(self, part: Part, machine: dict[str, Any], work: Path) -> None:
        """Run a part in as many processes as it takes."""
        result = self.result(part)
        if result.data["status"] == "complete":
            self.say(f"{part.name}: complete already, {len(result.cases)} cases")
            return
        if self.left() < part.least:
            self.skipped[part.name] = f"skipped: {max(0.0, self.left()):.0f} s were left, it needs {part.least:.0f}"
            self.say(f"{part.name}: {self.skipped[part.name]}")
            return
        for name in result.under_way():  # cases of a run that was itself killed
            del result.cases[name]
        result.set(machine=machine)
        began = time.time()
        until = min(began + self.factor * part.limit, self.until - RESERVE)
        self.say(f"{part.name}: {part.about}, at most {until - began:.0f} s")
        context = Context(self.shapes, self.simulated, work, until)
        for _ in range(MOST_PROCESSES):
            status, why = self.process(part, context)
            result = self.result(part)
            planned = result.data.get("planned", [])
            left = [name for name in planned if not result.ended(name)]
            result.set(status="complete" if planned and not left else "partial", left=left)
            # A process that could not even plan its cases, or came to its end with some left, would do so again.
            if not left or time.time() > until - part.least or (status != LOST and not why):
                break
        result.set(seconds=result.data.get("seconds", 0.0) + time.time() - began)
        counts = Counter(values["status"].replace("_", " ") for values in result.cases.values())
        text = ", ".join(f"{number} {kind}" for kind, number in counts.items()) or "no case began"
        self.say(f"{part.name}: {result.data['status']} after {time.time() - began:.0f} s: {text}")

    def process(self, part: Part, context: Context) -> tuple[int | None, str]:
        """Run one process of a part and watch it. Returns its exit status, and why it was stopped or died, if so."""
        file, log = self.output / f"{part.name}.json", context.work / f"{part.name}.log"
        command = self.python("srcfast_benchmarks.contact_part", part.module, str(file), context.to_json())
        began = last_line = time.time()
        why = ""
        with open(log, "wb") as output:
            options: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT, "process_group": 0}
            process = subprocess.Popen(command, cwd=ROOT, env=self.surroundings(), **options)
            try:
                while process.poll() is None and not why:
                    time.sleep(0.2)
                    why = self.why_to_stop(part, file, context)
                    if time.time() - last_line > PROGRESS:
                        last_line = time.time()
                        self.say(f"{part.name}: {progress(file)}")
            finally:  # also where this process is interrupted; what the part's process has started ends with it
                stop(process)
        status = process.poll()
        if not why and status not in (0, LOST):
            why = f"its process ended with exit status {status}"
        tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
        result = self.result(part)
        for name in result.under_way():
            if time.time() > context.until:  # it may be well: a later run repeats it
                result.update(name, stopped="the part's time was over")
            else:
                result.end(name, "killed", error=why or "its process ended", output=tail)
        seconds = time.time() - began
        result.add_process(exit=status, why=why, seconds=seconds, **({"output": tail} if why or status else {}))
        return status, why

    def why_to_stop(self, part: Part, file: Path, context: Context) -> str:
        """Why a part's process has to be stopped now; empty if it may go on."""
        if time.time() > context.until:
            return "the part's time was over"
        limit = self.factor * part.case_limit
        for name, values in (read(file) or {"cases": {}})["cases"].items():
            if values["status"] == "under_way" and time.time() - values["since"] > limit:
                return f"{name}: no result within {limit:.0f} s"
        return ""


def progress(file: Path) -> str:
    """`3 of 16 cases, at: nf4, r=16, 8192 tokens`."""
    stored = read(file) or {"cases": {}}
    under_way = [name for name, values in stored["cases"].items() if values["status"] == "under_way"]
    ended = len(stored["cases"]) - len(under_way)
    return f"{ended} of {len(stored.get('planned', []))} cases, at: {'; '.join(under_way) or 'its start'}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started: first SIGABRT, which makes Python print where it is, then SIGKILL."""
    for number in (signal.SIGABRT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):  # one that waits within a driver can't even be killed
            process.wait(GRACE)


if __name__ == "__main__":
    sys.exit(main())
