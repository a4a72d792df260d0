"""Time the implementations of a whole stage, each in separate processes, in turn: what the benchmarks of stages share.

An implementation does its rounds (training steps, batches of samples) and stops a watch after each; the first rounds warm up and
don't count. Every implementation is run several times, in turn with the others, so that a machine whose speed drifts slows all
alike; its peak memory is measured in another process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from srcfast.data.jsonl import write_json
from srcfast.report.plots import can_plot
from srcfast.run.environment import environment, version
from srcfast_benchmarks.harness import GIVES_BACK, PEERS, RESULTS, Shape, describe, resident, run_process

REPEATS = 3


class Watch:
    """Records rounds: an implementation calls it at the beginning and at the end of each."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.rounds: list[dict[str, Any]] = []
        self.values: dict[str, Any] = {}
        self._before = 0

    def start(self) -> None:
        """What comes now counts; what is held now does not count as memory."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
            self._before = resident("VmRSS")
        self._lap = time.perf_counter()

    def lap(self, units: int, tokens: int = 0, value: float | None = None, samples: int | None = None) -> None:
        """A round of so many units (pairs, tokens, ...), tokens and samples has ended.

        `value` is what implementations are compared by; a unit is a sample where their number is not given.
        """
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        count = {"units": units, "tokens": tokens, "samples": units if samples is None else samples}
        self.rounds.append({"seconds": now - self._lap, **count, "value": value})
        self._lap = time.perf_counter()

    def extra_mebibytes(self) -> float:
        """Peak memory since `start` beyond what was held then."""
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else resident("VmHWM")
        return max(0, peak - self._before) / 2**20

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within is on nobody's time."""
        began = time.perf_counter()
        yield
        self._lap += time.perf_counter() - began


Implementation = Callable[[Shape, Path, str, Watch], None]  # (shape, folder for checkpoints and records, device, watch)


@dataclass(frozen=True)
class StageBenchmark:
    """A stage and its implementations.

    unit: what is counted. shapes: by device. prepare: writes checkpoints and records into a folder, once a shape.
    implementations: the first is what the others are measured against. headline: the one of srcfast that counts when stages are
    added up. warm_up: rounds that don't count. tolerance: how far an implementation's values may be from the first one's of the
    same round; None where they can't be compared.
    """

    name: str
    unit: str
    shapes: dict[str, list[Shape]]
    prepare: Callable[[Shape, Path, str], None]
    implementations: dict[str, Implementation]
    headline: str
    warm_up: int = 1
    tolerance: float | None = None


def main(benchmark: StageBenchmark) -> None:
    """The command that every benchmark's file is."""

    def command(
        device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda" if torch.cuda.is_available() else "cpu",
        output: Annotated[Path, typer.Option(help="folder for the result and the plot")] = RESULTS,
        repeats: Annotated[int, typer.Option(help="processes an implementation")] = REPEATS,
        only: Annotated[str | None, typer.Option(hidden=True, help="one implementation and shape, as JSON")] = None,
    ) -> None:
        if device not in benchmark.shapes:
            raise typer.BadParameter(f"expected one of {', '.join(benchmark.shapes)}, found {device}")
        if only is not None:
            print(json.dumps(run_implementation(benchmark, **json.loads(only), device=device)))
            return
        rows = measure_all(benchmark, device, repeats)
        output.mkdir(parents=True, exist_ok=True)
        known = environment()
        machine = {key: known[key] for key in ("gpu", "cpu", "threads", "torch", "git_commit")}
        machine["versions"] = {name: installed for name in PEERS if (installed := version(name))}
        about = {"benchmark": benchmark.name, "unit": benchmark.unit, "headline": benchmark.headline, "device": device}
        write_json(output / f"{benchmark.name}_{device}.json", about | {"machine": machine, "rows": rows})
        plot(output / f"{benchmark.name}_{device}.svg", benchmark, rows)
        for table in tables(benchmark, rows):
            Console().print(table)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()


def run_implementation(benchmark: StageBenchmark, impl: str, shape: Shape, folder: str, device: str) -> dict[str, Any]:
    """Run one implementation in this process: return its rounds and extra memory; {"left_out": why} if it can't run here."""
    watch = Watch(device)
    try:
        benchmark.implementations[impl](shape, Path(folder), device, watch)
    except ImportError as missing:
        return {"left_out": str(missing)}
    return {"rounds": watch.rounds, "extra_mebibytes": watch.extra_mebibytes(), **watch.values}


def measure_all(benchmark: StageBenchmark, device: str, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each shape and implementation."""
    progress, rows = Console(stderr=True), []
    for shape in benchmark.shapes[device]:
        with tempfile.TemporaryDirectory() as folder:
            progress.print(f"{benchmark.name}: {describe(shape)}", style="dim", soft_wrap=True)
            benchmark.prepare(shape, Path(folder), device)
            results: dict[str, list[dict[str, Any]]] = {impl: [] for impl in benchmark.implementations}
            memory: dict[str, dict[str, Any]] = {}
            for repeat in range(repeats + 1):  # the last for the CPU's memory, whose allocator is slower then
                for impl in benchmark.implementations:
                    if any({"left_out", "failed"} & set(done) for done in results[impl]):
                        continue
                    done = _in_a_process(impl, shape, folder, device, for_memory=repeat == repeats)
                    said = (
                        done.get("failed")
                        or done.get("left_out")
                        or f"{sum(r['seconds'] for r in done['rounds']):.1f} s"
                    )
                    progress.print(f"  {impl}, {repeat + 1} of {repeats + 1}: {said}", style="dim", soft_wrap=True)
                    if repeat < repeats or "rounds" not in done:
                        results[impl].append(done)
                    else:
                        memory[impl] = done
            rows += _rows(benchmark, shape, results, memory)
    return rows


def _in_a_process(impl: str, shape: Shape, folder: str, device: str, for_memory: bool) -> dict[str, Any]:
    only = json.dumps({"impl": impl, "shape": shape, "folder": folder})
    surroundings = os.environ | {"HF_HUB_OFFLINE": "1"} | (GIVES_BACK if for_memory else {})
    return run_process([sys.argv[0], "--device", device, "--only", only], surroundings)


def _rows(
    benchmark: StageBenchmark, shape: Shape, results: dict[str, list[dict[str, Any]]], memory: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for impl, runs in results.items():
        row: dict[str, Any] = {"shape": shape, "way": impl}  # `way`: the key in committed results
        bad = next((run for run in runs if "rounds" not in run), None)
        if bad is not None:
            if "failed" in bad:
                rows.append(row | {"failed": bad["failed"]})
            continue
        rounds = [a_round for run in runs for a_round in run["rounds"][benchmark.warm_up :]]
        rates = [a_round["units"] / a_round["seconds"] for a_round in rounds]
        low, middle, high = np.quantile(rates, (0.2, 0.5, 0.8))
        row |= {"per_second": middle, "low": low, "high": high, "rounds": len(rounds), "processes": len(runs)}
        for name in ("tokens", "samples"):
            row[f"{name}_per_second"] = float(np.median([a_round[name] / a_round["seconds"] for a_round in rounds]))
        row["per_second_overall"] = sum(a_round["units"] for a_round in rounds) / sum(
            a_round["seconds"] for a_round in rounds
        )
        row["extra_mebibytes"] = memory[impl]["extra_mebibytes"]
        row["values"] = [a_round["value"] for a_round in runs[0]["rounds"] if a_round["value"] is not None]
        row |= {key: value for key, value in runs[0].items() if key not in ("rounds", "extra_mebibytes")}
        first = next((other for other in rows if "failed" not in other), row)
        row["speedup"] = row["per_second"] / first["per_second"]
        if first["extra_mebibytes"] >= 1.0:  # less is a page or two of anything
            row["memory_ratio"] = row["extra_mebibytes"] / first["extra_mebibytes"]
        if row["values"] and first["values"]:
            pairs = zip(row["values"], first["values"], strict=False)
            row["largest_difference"] = max(abs(value - first_value) for value, first_value in pairs)
        rows.append(row)
    return rows


def tables(benchmark: StageBenchmark, rows: list[dict[str, Any]]) -> Iterator[Table]:
    """A table a shape; speed-up and memory are relative to the first implementation."""
    for shape in dict.fromkeys(describe(row["shape"]) for row in rows):
        title = f"{benchmark.name}: {shape}"
        shown = Table(title=title, title_justify="left", min_width=72)
        titles = (f"{benchmark.unit}/s", "20 to 80 %", "speed-up", "extra MiB", "memory", "difference")
        for column in ("implementation", *titles):
            shown.add_column(column, justify="left" if column == "implementation" else "right")
        for row in (row for row in rows if describe(row["shape"]) == shape):
            if "failed" in row:
                shown.add_row(row["way"], *[""] * (len(titles) - 1), "failed")
                continue
            spread = f"{row['low']:.3g} to {row['high']:.3g}"
            cells = [
                f"{row['per_second']:.3g}",
                spread,
                f"{row['speedup']:.2f}",
                f"{row['extra_mebibytes']:.0f}",
            ]
            off = f"{row['largest_difference']:.1e}" if "largest_difference" in row else ""
            shown.add_row(row["way"], *cells, f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "", off)
        yield shown


def plot(path: Path, benchmark: StageBenchmark, rows: list[dict[str, Any]]) -> None:
    """Plot rate, memory and, where implementations are compared by a value, its course; without matplotlib nothing."""
    if not can_plot():
        return
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = benchmark.name
    import matplotlib.pyplot as plt

    good = [row for row in rows if "failed" not in row and row["shape"] == rows[0]["shape"]]
    curves = benchmark.tolerance is not None
    figure, axes = plt.subplots(
        1, 2 + curves, figsize=(11, 1.4 + 0.35 * len(good) + 1.6 * curves), layout="constrained"
    )
    panels = zip(axes, ("per_second", "extra_mebibytes"), (f"{benchmark.unit}/s", "extra memory, MiB"), strict=False)
    for axis, key, label in panels:
        values = [row[key] for row in good]
        axis.barh([row["way"] for row in good], values, color=[f"C{number}" for number in range(len(good))])
        for position, value in enumerate(values):
            axis.annotate(f" {value:.3g}", (value, position), va="center", fontsize=8)
        axis.set_xlabel(label)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    axes[1].set_yticks([])
    if curves:
        for number, row in enumerate(good):
            style = "-" if number == 0 else "--"
            axes[2].plot(row["values"], style, label=row["way"], color=f"C{number}", linewidth=1.2)
        axes[2].set_xlabel("step")
        axes[2].set_ylabel("loss")
        axes[2].spines[["top", "right"]].set_visible(False)
        axes[2].legend(frameon=False, fontsize=7)
    figure.suptitle(f"{benchmark.name}: {describe(good[0]['shape'])}", x=0.01, ha="left", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
