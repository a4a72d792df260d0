"""The process in which one part of first contact runs: `python -m srcfast_benchmarks.contact_part MODULE FILE CONTEXT`.

A part is a module with `cases(context)`: functions of a `Case` by name; each returns what it measured. Cases run in turn, unless
the module's `at_once(context)` says how many run side by side. Cases that have ended according to FILE are not run, so that a
process that died can be followed by another for the rest. After a failure the device is checked: if it no longer answers, the
process ends with LOST.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from srcfast_benchmarks.contact_results import Context, Result, read

LOST = 75  # exit status: the device no longer answers this process, start another


class LeftOut(Exception):
    """A case cannot be run here; the message says why."""


class Case:
    """What a case is given: the context, and a function that stores what it has measured so far."""

    def __init__(self, name: str, context: Context, result: Result) -> None:
        self.name, self.context, self._result = name, context, result

    def store(self, **values: Any) -> None:
        self._result.update(self.name, **values)


Cases = dict[str, Callable[[Case], dict[str, Any]]]


def main(module: str, file: Path, context: Context) -> int:
    """Run the cases of a part that have not ended yet; return the exit status."""
    faulthandler.enable()
    stored = read(file) or {}
    result = Result(file, {key: stored[key] for key in ("part", "about", "simulated", "shapes", "commit", "sources")})
    part = importlib.import_module(module)
    cases: Cases = part.cases(context)
    result.set(planned=list(cases))
    left = [name for name in cases if not result.ended(name)]
    at_once = part.at_once(context) if hasattr(part, "at_once") else 1
    if at_once == 1:
        return 0 if all(run(name, cases[name], context, result) for name in left) else LOST
    with ThreadPoolExecutor(at_once) as pool:
        answered = list(pool.map(lambda name: run(name, cases[name], context, result), left))
    return 0 if all(answered) else LOST


def run(name: str, work: Callable[[Case], dict[str, Any]], context: Context, result: Result) -> bool:
    """Run one case and store its outcome; return whether the device still answers."""
    print(f"{name}: begins", flush=True)
    result.begin(name)
    try:
        values = work(Case(name, context, result))
    except (ImportError, LeftOut) as missing:
        result.end(name, "left_out", why=f"{type(missing).__name__}: {missing}")
        return True
    except Exception as error:
        result.fail(name, error)
        print(result.cases[name]["traceback"], file=sys.stderr, flush=True)
        return answers()
    result.end(name, "done", **values)
    return True


def answers() -> bool:
    """Whether the device still works for this process. Frees what a failed case left in its memory."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return True
    try:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return bool(torch.ones(1, device="cuda").add(1).item() == 2)
    except Exception as error:
        print(f"the device no longer answers this process: {error}", file=sys.stderr, flush=True)
        return False


if __name__ == "__main__":
    from srcfast_benchmarks import contact_part  # the module that parts import, not this second copy of it

    began = time.perf_counter()
    status = contact_part.main(sys.argv[1], Path(sys.argv[2]), Context.from_json(sys.argv[3]))
    print(f"ended with {status} after {time.perf_counter() - began:.1f} s", flush=True)
    os._exit(status)  # destructors that wait for a lost device must not run
