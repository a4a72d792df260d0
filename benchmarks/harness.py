"""Time the implementations of an operation side by side, and write a table, a CSV and a plot: what benchmarks share.

Each implementation and shape runs in a separate process, so that its peak memory is not another's and a crash is one row; on a
CPU memory is measured in another one, whose allocator gives back at once what is freed. Forward is without gradients, backward is
over a graph that is retained, both is one after the other from nothing.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from srcfast.memory.allocator import allocator_variables
from srcfast.report.plots import can_plot
from srcfast.run.environment import environment, version

RESULTS = Path(__file__).parent / "results"
PEERS = (
    "triton",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "trl",
    "peft",
    "bitsandbytes",
    "flash-attn",
    "xformers",
)
LEAST_RUNS, LEAST_SECONDS = 5, 0.5  # timed on a CPU, whichever takes longer;
MOST_SECONDS = 8.0  # but three runs are enough of what takes longer than this in all
GPU_MILLISECONDS = 500  # timed on a GPU

Shape = dict[str, Any]
Inputs = dict[str, Any]
Run = Callable[[], Tensor]
# glibc: what is large is mapped and unmapped by itself, so that resident memory is what is held. It would slow the timed runs.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass(frozen=True)
class Benchmark:
    """An operation and its implementations.

    shapes: by device (cpu, cuda). inputs: (shape, device) -> what the implementations share; tensors that require a gradient get
    one. implementations: by name, the first is what the others are measured against; (inputs) -> what is timed. One that needs a
    package that isn't installed, or another device, raises ImportError and is left out. limits: names of implementations that do
    less than the operation, as bounds.
    """

    name: str
    shapes: dict[str, list[Shape]]
    inputs: Callable[[Shape, str], Inputs]
    implementations: dict[str, Callable[[Inputs], Run]]
    limits: tuple[str, ...] = ()


def generator(device: str) -> torch.Generator:
    """Return a generator that gives the same numbers for every implementation."""
    return torch.Generator(device).manual_seed(0)


def normal(*size: int, device: str, dtype: str, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Draw normal numbers in a dtype given by name, without a second copy."""
    numbers = torch.empty(*size, device=device, dtype=getattr(torch, dtype))
    return numbers.normal_(0.0, scale, generator=torch.Generator(device).manual_seed(seed))


def on(device: str, inputs: Inputs) -> None:
    """Leave an implementation out unless the inputs are on this device."""
    if not any(isinstance(value, Tensor) and value.device.type == device for value in inputs.values()):
        raise ImportError(f"for {device} only")


# One implementation, one shape ------------------------------------------------------------------------------------------


def measure(benchmark: Benchmark, impl: str, shape: Shape, what: str, device: str) -> dict[str, Any]:
    """Return times: milliseconds of each mode (median, 20th and 80th percentile, runs); memory: peak MiB beyond the inputs."""
    inputs = benchmark.inputs(shape, device)
    try:
        run = benchmark.implementations[impl](inputs)
    except ImportError as missing:
        return {"left_out": str(missing)}
    leaves = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        output = run()
        torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

    (both if leaves else forward)()  # compiles, tunes, and fills caches
    if what == "memory":
        return {"extra_mebibytes": extra_bytes(both if leaves else forward, device) / 2**20}
    modes = {"forward": forward}
    if leaves:
        output = run()
        gradient = torch.ones_like(output)
        modes["backward"] = lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True, allow_unused=True)
        modes["both"] = both
    return {"times": {mode: quantiles(call, device) for mode, call in modes.items()}}


def quantiles(call: Callable[[], None], device: str) -> dict[str, float]:
    """Milliseconds of a call: median, 20th and 80th percentile; on a GPU as `triton.testing.do_bench` has them."""
    if device == "cuda" and "SIMULATED_CUDA" not in os.environ:  # a simulated device has no events to time by
        from triton.testing import do_bench

        middle, low, high = do_bench(call, warmup=50, rep=GPU_MILLISECONDS, quantiles=[0.5, 0.2, 0.8])
        return {"milliseconds": middle, "low": low, "high": high}
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < MOST_SECONDS and (len(taken) < LEAST_RUNS or sum(taken) < LEAST_SECONDS)):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    low, middle, high = 1e3 * np.quantile(taken, (0.2, 0.5, 0.8))
    return {"milliseconds": middle, "low": low, "high": high, "runs": len(taken)}


def extra_bytes(call: Callable[[], None], device: str) -> int:
    """Peak memory of a call beyond what is held before it: the allocator's on a GPU, else resident memory (Linux)."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)


def resident(name: str) -> int:
    """A line of this process's memory in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


# All implementations, all shapes ----------------------------------------------------------------------------------------


def main(benchmark: Benchmark) -> None:
    """The command that every benchmark's file is."""

    def command(
        device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda" if torch.cuda.is_available() else "cpu",
        output: Annotated[Path, typer.Option(help="folder for the CSV and the plot")] = RESULTS,
        only: Annotated[str | None, typer.Option(hidden=True, help="one implementation and shape, as JSON")] = None,
    ) -> None:
        if device not in benchmark.shapes:
            raise typer.BadParameter(f"expected one of {', '.join(benchmark.shapes)}, found {device}")
        if only is not None:
            print(json.dumps(measure(benchmark, **json.loads(only), device=device)))
            return
        rows = measure_all(benchmark, device)
        output.mkdir(parents=True, exist_ok=True)
        write_csv(output / f"{benchmark.name}_{device}.csv", rows)
        plot(output / f"{benchmark.name}_{device}.svg", benchmark.name, rows)
        for table in tables(benchmark.name, rows):
            Console().print(table)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()


def measure_all(benchmark: Benchmark, device: str) -> list[dict[str, Any]]:
    """A row for each shape, implementation and mode; times and memory also relative to the first implementation's."""
    progress, rows = Console(stderr=True), []
    for shape in benchmark.shapes[device]:
        baseline: dict[str, Any] = {}
        for impl in benchmark.implementations:
            progress.print(f"{benchmark.name}: {impl}, {describe(shape)}", style="dim", soft_wrap=True)
            result: dict[str, Any] = {}
            for what in ("times", "memory"):
                if not {"left_out", "failed"} & set(result):
                    result |= in_a_process(impl, shape, what, device)
            if "left_out" in result:
                progress.print(f"  left out: {result['left_out']}", style="dim")
                continue
            # `way`: the column of the committed CSV files, which `grouped` and the summary read.
            common = {"benchmark": benchmark.name, **shape, "way": impl, "limit": impl in benchmark.limits}
            if "failed" in result:
                progress.print(f"  failed: {result['failed']}", style="red")
                rows.append(common | {"mode": "both", "failed": result["failed"]})
                continue
            baseline = baseline or result
            memory = result["extra_mebibytes"]
            for mode, taken in result["times"].items():
                ratio = taken["milliseconds"] / baseline["times"][mode]["milliseconds"]
                rows.append(common | {"mode": mode} | taken | {"time_ratio": ratio})
            rows[-1]["extra_mebibytes"] = memory
            if baseline["extra_mebibytes"] >= 1.0:  # less is a page or two of anything
                rows[-1]["memory_ratio"] = memory / baseline["extra_mebibytes"]
    return rows


def in_a_process(impl: str, shape: Shape, what: str, device: str) -> dict[str, Any]:
    """Run `measure` in a separate process; {"failed": why} where it dies."""
    arguments = [sys.argv[0], "--device", device, "--only", json.dumps({"impl": impl, "shape": shape, "what": what})]
    return run_process(arguments, os.environ | (GIVES_BACK if what == "memory" else {}))


def run_process(arguments: list[str], surroundings: Mapping[str, str]) -> dict[str, Any]:
    """Run a Python process with srcfast's allocator; return the JSON it prints last, {"failed": why} if it died."""
    variables = {**surroundings, **allocator_variables(surroundings)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = [line for line in done.stderr.splitlines() if re.match(r"\w*(\.\w+)*Error\b", line)]
    return {"failed": said[-1] if said else f"exit status {done.returncode}"}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows, each with machine, versions and commit."""
    known = environment()
    machine = {key: known[key] for key in ("gpu", "cpu", "threads", "torch", "git_commit")}
    machine["versions"] = " ".join(f"{name}={installed}" for name in PEERS if (installed := version(name)))
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*fields, *machine], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            short = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow(short | machine)


def tables(name: str, rows: list[dict[str, Any]]) -> Iterator[Table]:
    """Yield a table a shape: milliseconds of each mode; time and memory relative to the first one's, less is better."""
    groups = grouped(rows)
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for shape in dict.fromkeys(shape for shape, _, _ in groups):
        shown = Table(title=f"{name}: {shape}", title_justify="left", min_width=72)
        for column in ("implementation", *(f"{mode} ms" for mode in modes), "time", "extra MiB", "memory"):
            shown.add_column(column, justify="left" if column == "implementation" else "right")
        for _, impl, by_mode in (group for group in groups if group[0] == shape):
            last, taken = by_mode[-1], {row["mode"]: row for row in by_mode}
            cells = [f"{impl} (limit)" if last["limit"] else impl]
            if "failed" in last:
                shown.add_row(*cells, *[""] * len(modes), "failed")
                continue
            cells += [f"{taken[mode]['milliseconds']:.3g}" if mode in taken else "" for mode in modes]
            cells += [f"{last['time_ratio']:.2f}", f"{last['extra_mebibytes']:.0f}"]
            shown.add_row(*cells, f"{last['memory_ratio']:.2f}" if "memory_ratio" in last else "")
        yield shown


def plot(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Plot time and extra memory of each implementation at each shape; without matplotlib nothing."""
    if not can_plot():
        return
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = name
    import matplotlib.pyplot as plt

    results = [(shape, impl, by_mode[-1]) for shape, impl, by_mode in grouped(rows) if "failed" not in by_mode[-1]]
    shapes = list(dict.fromkeys(shape for shape, _, _ in results))
    implementations = list(dict.fromkeys(impl for _, impl, _ in results))
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.22 * len(results)), sharey=True, layout="constrained")
    for axis, key, label in zip(
        axes, ("milliseconds", "extra_mebibytes"), ("milliseconds", "extra memory, MiB"), strict=True
    ):
        for number, impl in enumerate(implementations):
            of_impl = {shape: row for shape, its_impl, row in results if its_impl == impl}
            positions = [
                shapes.index(shape) + (number - (len(implementations) - 1) / 2) * 0.8 / len(implementations)
                for shape in of_impl
            ]
            values = [row[key] for row in of_impl.values()]
            axis.barh(positions, values, height=0.8 / len(implementations), label=impl, color=f"C{number}")
            for position, value in zip(positions, values, strict=True):
                axis.annotate(f" {value:.3g}", (value, position), va="center", fontsize=7)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    axes[0].set_yticks(range(len(shapes)), [shape.replace(", ", "\n") for shape in shapes], fontsize=7)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{name} ({results[0][2]['mode']}): less is better", x=0.01, ha="left", fontsize=10)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def grouped(rows: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Group rows: (shape, implementation, its rows by mode), in order."""
    reserved = {"benchmark", "way", "limit", "mode", "milliseconds", "low", "high", "runs", "failed"}
    reserved |= {"time_ratio", "extra_mebibytes", "memory_ratio"}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        shape = describe({key: value for key, value in row.items() if key not in reserved})
        groups.setdefault((shape, row["way"]), []).append(row)
    return [(shape, impl, modes) for (shape, impl), modes in groups.items()]


def describe(shape: Shape) -> str:
    """`rows 2048, vocabulary 32064`."""
    return ", ".join(f"{name} {value}" for name, value in shape.items())
