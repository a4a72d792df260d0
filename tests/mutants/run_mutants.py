"""Put each listed fault into a copy of the tree, run the tests that must notice it, and print which do.

`faults/ROOM.toml` lists the faults of a room: a file, a snippet that occurs in it once, what replaces it, what that breaks, and
the tests, of the same room, of which at least one must then fail. `make mutants` runs all, `make mutants PART=3/20` a twentieth.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).parent / "faults"
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "results", "runs")
MARKS = "not gpu and not simulated and not fault and not fuzz"
TIMEOUT = 600.0  # seconds of one fault's tests
# A test that ends so has not run: that the fault was noticed is not shown.
NOT_RUN = ("ImportError", "ModuleNotFoundError", "SyntaxError", "NameError", "IndentationError")


def write_source(path: Path, text: str) -> None:
    """Replace a module, and remove what was compiled of it: within a second Python would take that for the new one's."""
    path.write_text(text, encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


@dataclass(frozen=True)
class Fault:
    """A small change of the source that breaks something.

    Attributes:
        room: name of the file that lists it.
        file: to change, relative to the root.
        find: a snippet that occurs in the file once.
        replace: what stands there instead.
        breaks: what is wrong then.
        tests: node ids, of which at least one must fail.
    """

    room: str
    file: str
    find: str
    replace: str
    breaks: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> None:
        """Change the file below `root`. Raises ValueError where the snippet does not occur exactly once."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.find)) != 1:
            raise ValueError(
                f"{self.room}.toml, {self.breaks!r}: expected once in {self.file}, found {count} times: {self.find!r}"
            )
        write_source(path, text.replace(self.find, self.replace))


@dataclass(frozen=True)
class Outcome:
    """What the tests of a fault have said: `noticed` is empty where none failed; `problem` where they could not tell."""

    fault: Fault
    noticed: str
    problem: str
    seconds: float


def read_faults() -> list[Fault]:
    """Read the faults of all rooms."""
    faults = []
    for file in sorted(FAULTS.glob("*.toml")):
        for entry in tomllib.loads(file.read_text(encoding="utf-8"))["fault"]:
            tests = entry.pop("tests")
            faults.append(Fault(room=file.stem, **entry, tests=tuple([tests] if isinstance(tests, str) else tests)))
    return faults


def select(faults: Sequence[Fault], part: str | None) -> list[Fault]:
    """Return part K of N, every N-th fault: each part has faults of all rooms. Raises ValueError for another text."""
    if part is None:
        return list(faults)
    number, _, parts = part.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise ValueError(f"--part: expected K/N with K from 1 to N, found {part!r}")
    return list(faults)[int(number) - 1 :: int(parts)]


# Running tests --------------------------------------------------------------------------------------------------------


def preload() -> None:
    """Import what all tests need, once: each fault's tests run in a fork of this process, which has it already."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import transformers  # noqa: F401
    import triton  # noqa: F401
    import typer.testing  # noqa: F401

    torch.set_num_threads(1)


def run_tests(tree: Path, tests: Sequence[str], stop_early: bool) -> None:
    """Run tests of the tree in this process, and end it; `tree/report.xml` says how they ended."""
    import pytest

    os.setsid()
    output = os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    paths = [str(tree), str(tree / "kernels")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for processes that the tests start
    sys.path[:0] = paths
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", MARKS, "--junitxml=report.xml"]
    options += [f"--basetemp={tree / 'temporary'}", *(["-x"] if stop_early else [])]
    os._exit(int(pytest.main([*options, *tests])))


def start(tree: Path, tests: Sequence[str], stop_early: bool = True) -> BaseProcess:
    """Start tests of the tree in a fork."""
    (tree / "report.xml").unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(tree, tests, stop_early))
    process.start()
    return process


def read_report(tree: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (test, message) of the tests that failed, and the names of those that passed."""
    failed, passed = [], []
    for case in ElementTree.parse(tree / "report.xml").iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        ends = [one for one in case if one.tag in ("failure", "error", "skipped")]
        failed += [(name, one.get("message") or "") for one in ends if one.tag != "skipped"]
        passed += [name] if not ends else []
    return failed, passed


def judge(tree: Path, fault: Fault, exit_code: int | None, seconds: float) -> Outcome:
    """Read how a fault's tests ended."""
    if exit_code is None:
        return Outcome(fault, "", f"no end after {TIMEOUT:.0f} s", seconds)
    if exit_code not in (0, 1) or not (tree / "report.xml").is_file():
        last = (tree / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return Outcome(fault, "", f"the tests did not run (exit code {exit_code}): {' '.join(last)}", seconds)
    failed, _ = read_report(tree)
    for name, message in failed:
        if not message.startswith(NOT_RUN):
            return Outcome(fault, name, "", seconds)
    return Outcome(fault, "", failed[0][1] if failed else "", seconds)


@contextmanager
def copies(count: int) -> Iterator[list[Path]]:
    """Make copies of the tree."""
    with tempfile.TemporaryDirectory(prefix="srcfast-mutants-") as folder:
        trees = [Path(folder) / str(number) for number in range(count)]
        for tree in trees:
            shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        yield trees


def check_unchanged(tree: Path, faults: Sequence[Fault]) -> str:
    """Run all the faults' tests on the unchanged tree; return what is wrong, or nothing."""
    tests = sorted({test for fault in faults for test in fault.tests})
    # Each file once, and no test beside its file.
    tests = [test for test in tests if "::" not in test or test.partition("::")[0] not in tests]
    process = start(tree, tests, stop_early=False)
    process.join()
    if process.exitcode == 0:
        return ""
    return (tree / "output.txt").read_text(encoding="utf-8", errors="replace")[-4000:]


def run_faults(trees: Sequence[Path], faults: Sequence[Fault]) -> list[Outcome]:
    """Run each fault's tests, as many faults at a time as there are trees."""
    began, waiting, outcomes = time.monotonic(), list(reversed(faults)), []
    free, running = list(trees), dict[Path, tuple[Fault, BaseProcess, float, str]]()
    while waiting or running:
        while waiting and free:
            fault, tree = waiting.pop(), free.pop()
            original = (tree / fault.file).read_text(encoding="utf-8")
            fault.apply(tree)
            running[tree] = fault, start(tree, fault.tests), time.monotonic(), original
        time.sleep(0.05)
        for tree, (fault, process, started, original) in list(running.items()):
            seconds = time.monotonic() - started
            if process.is_alive() and seconds < TIMEOUT:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            outcomes.append(judge(tree, fault, process.exitcode if seconds < TIMEOUT else None, seconds))
            write_source(tree / fault.file, original)
            free.append(tree)
            del running[tree]
            left = (time.monotonic() - began) / len(outcomes) * (len(faults) - len(outcomes))
            missed = sum(not outcome.noticed for outcome in outcomes)
            print(f"{len(outcomes)}/{len(faults)} faults, {missed} not noticed, {left:.0f} s left", file=sys.stderr)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Write a row for each fault: its room, what it breaks, and the test that noticed it."""
    lines = []
    for outcome in sorted(outcomes, key=lambda one: (bool(one.noticed), one.fault.room)):
        end = outcome.noticed or f"NOT NOTICED {outcome.problem}".strip()
        lines.append(f"{outcome.fault.room:<11} {outcome.fault.breaks:<72} {outcome.seconds:5.1f} s  {end}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", help="K/N: every N-th fault alone, from the K-th on")
    parser.add_argument("--room", help="faults of this room alone")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1), help="faults at a time")
    options = parser.parse_args()
    faults = select([one for one in read_faults() if options.room in (None, one.room)], options.part)
    if not faults:
        parser.error(f"no faults of room {options.room!r}, part {options.part}")
    preload()
    with copies(min(options.processes, len(faults))) as trees:
        print(f"{len(faults)} faults; first their tests on the unchanged tree", file=sys.stderr)
        if problem := check_unchanged(trees[0], faults):
            print(f"{problem}\nThe unchanged tree does not pass the faults' tests.", file=sys.stderr)
            return 1
        outcomes = run_faults(trees, faults)
    print(table(outcomes))
    noticed = sum(bool(outcome.noticed) for outcome in outcomes)
    print(f"{noticed} of {len(outcomes)} faults are noticed")
    return 0 if noticed == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
