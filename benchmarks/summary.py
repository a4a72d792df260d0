"""Write all committed results as text: `python -m srcfast_benchmarks.summary`.

It writes docs/benchmarks.md, and between marks the README's tables and those of the study in docs/results.md.
"""

from __future__ import annotations

import csv
import json
from itertools import product
from pathlib import Path
from typing import Any

from srcfast_benchmarks import BENCHMARKS, GENERAL_STAGES, STAGES
from srcfast_benchmarks.harness import RESULTS, describe, grouped
from srcfast_benchmarks.study_tables import readme_tables, results_tables

ROOT = Path(__file__).resolve().parents[1]
PAGE, STUDY_PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "results.md", ROOT / "README.md"
BEGIN = "<!-- performance: written by python -m srcfast_benchmarks.summary -->"
END = "<!-- end of performance -->"
STUDY_BEGIN = "<!-- study: written by python -m srcfast_benchmarks.summary -->"
STUDY_END = "<!-- end of study -->"
MACHINE = ("gpu", "cpu", "threads", "torch", "git_commit", "versions")
OURS = "srcfast"
NO_GPU = (
    "Nothing has been measured on a GPU yet: `python -m srcfast_benchmarks.first_contact` is the first command to run on one, "
    "`srcfast bench --device cuda` the second."
)
FIRST_CONTACT = "What first contact with a GPU showed: `benchmarks/results/gpu/README.md`."
INTRODUCTION = """# Benchmarks

Written by `python -m srcfast_benchmarks.summary` from the files in `benchmarks/results/`, which `srcfast bench` writes. {missing}

**Stages**: the same work by srcfast and by peers, in processes run in turn. The rate is the median over rounds (steps, batches of
samples) of all processes, beside it the 20th and 80th percentile. Memory is the peak beyond what was held when the stage began.

**Operations**: time and memory are relative to the first implementation of a table: less is better. Milliseconds are medians of
forward and backward together (forward where there is no backward), with the 20th and 80th percentile; memory is the peak beyond
the inputs. A *limit* does less than the operation.

## In short

{short}
## First contact with a GPU

Whenever a machine with a GPU is at hand, this runs first, from a clone. It takes ten minutes:

```
python -m pip install --no-index --no-deps --no-build-isolation --editable . wheels/*.whl
python -m srcfast_benchmarks.first_contact --minutes 10
```

The first line installs srcfast, and from `wheels/` the packages that were brought along because the machine lacks them; without
any, leave `wheels/*.whl` out. The second runs, in this order, each part in a process with a time limit: the demo in bf16; the
tests marked `gpu`; DPO steps of a 7B LLaVA-1.5 with random weights, at 1k to 16k tokens a forest, r = 16 and 128, NF4 and bf16;
beam search of 4 samples by 24 rows, two pieces in a row, with and without graphs; the drift of log-probabilities between
packings, and between decoding and training; one judging forest of a 1.5B R-Scorer; each operation at one shape; the same DPO
steps in TRL, where it is installed.

A part that fails or hangs ends no other. `benchmarks/results/gpu/` gets a JSON file for each part, rewritten after every case,
and `README.md`: what fell short of its target, what was not measured, and all ratios. The same command again runs only what is
left, unless a source has changed. `--parts demo,kernels` runs these parts alone; `--commit` names the commit where there is no
`.git`. Fix what the page shows, run the command again, and commit the folder.

A rehearsal without a GPU, shrunk, on the simulated device of the tests (it needs a CPU build of PyTorch and a C++ compiler),
writes to `build/first_contact/`:

```
python -m srcfast_benchmarks.first_contact --shapes tiny --simulated
```
"""


# Reading ----------------------------------------------------------------------------------------------------


def operation_results(device: str) -> dict[str, list[dict[str, Any]]]:
    """Read the rows of each operation's CSV, of those that were measured on a device."""
    results = {}
    for name in BENCHMARKS:
        file = RESULTS / f"{name}_{device}.csv"
        if file.is_file():
            with open(file, encoding="utf-8", newline="") as lines:
                results[name] = list(csv.DictReader(lines))
    return results


def stage_results(device: str) -> dict[str, dict[str, Any]]:
    """Read each stage's JSON, of those that were measured on a device."""
    files = {name: RESULTS / f"{name}_{device}.json" for name in (*STAGES, *GENERAL_STAGES)}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def by_shape(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Group a stage's rows that didn't fail by their shape in words."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if "failed" not in row:
            groups.setdefault(describe(row["shape"]), []).append(row)
    return groups


def where(machine: dict[str, Any], device: str, *others: dict[str, Any]) -> str:
    """Return `2 threads of ...; torch ...; commit ...`; with the commits of other results from the same machine."""
    hardware = machine["gpu"] if device == "cuda" else f"{machine['threads']} threads of {machine['cpu']}"
    versions = machine["versions"]
    if not isinstance(versions, str):
        versions = " ".join(f"{name}={version}" for name, version in versions.items())
    commits = dict.fromkeys(about["git_commit"].removesuffix("-dirty")[:10] for about in (machine, *others))
    return f"{hardware}; torch {machine['torch']} {versions}; commit {', '.join(commits)}."


def on_a_gpu() -> str:
    """What there is of a GPU where `srcfast bench` has not run on one."""
    return FIRST_CONTACT if (RESULTS / "gpu" / "README.md").is_file() else NO_GPU


# The page ---------------------------------------------------------------------------------------------------


def page() -> str:
    """docs/benchmarks.md."""
    parts = []
    for device in ("cuda", "cpu"):
        for name, result in stage_results(device).items():
            parts.append(stage_section(name, device, result))
    for name in BENCHMARKS:
        for device in ("cuda", "cpu"):
            rows = operation_results(device).get(name)
            if rows:
                parts.append(operation_section(name, device, rows))
    missing = "" if operation_results("cuda") else on_a_gpu()
    return INTRODUCTION.format(missing=missing, short=ratios()).rstrip() + "\n\n" + "\n".join(parts)


def stage_section(name: str, device: str, result: dict[str, Any]) -> str:
    """A stage on a device: a table a shape."""
    unit = result["unit"]
    lines = [f"## {name}, {device}", "", where(result["machine"], device), ""]
    for shape, rows in by_shape(result).items():
        titles = [
            "implementation",
            f"{unit}/s",
            "20 to 80 %",
            "speed-up",
            "extra MiB",
            "memory",
            "largest difference",
            "rounds x processes",
        ]
        lines += [f"{shape}:", "", f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
        for row in rows:
            off = f"{row['largest_difference']:.1e}" if "largest_difference" in row else ""
            counts = f"{row['rounds'] // row['processes']} x {row['processes']}"
            cells = [row["way"], number(row["per_second"]), f"{number(row['low'])} to {number(row['high'])}"]
            cells += [
                f"{row['speedup']:.2f}",
                f"{row['extra_mebibytes']:.0f}",
                f"{row['memory_ratio']:.2f}",
                off,
                counts,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        failed = [row for row in result["rows"] if "failed" in row and describe(row["shape"]) == shape]
        lines += [f"| {row['way']} | failed: {row['failed']} |{' |' * (len(titles) - 2)}" for row in failed]
        lines.append("")
    return "\n".join(lines)


def operation_section(name: str, device: str, rows: list[dict[str, Any]]) -> str:
    """An operation on a device: a table a shape."""
    lines = [f"## {name}, {device}", "", where(rows[0], device), ""]
    for shape, implementations in rows_by_shape(rows).items():
        lines += [
            f"{shape}:",
            "",
            "| implementation | ms | time | extra MiB | memory |",
            "| --- | --- | --- | --- | --- |",
        ]
        for impl, row in implementations.items():
            title = f"{impl} (limit)" if row["limit"] == "True" else impl
            if row.get("failed"):
                lines.append(f"| {title} | failed | | | |")
                continue
            taken = f"{row['milliseconds']} ({row['low']} to {row['high']})"
            lines.append(
                f"| {title} | {taken} | {row['time_ratio']} | {row['extra_mebibytes']} | {row.get('memory_ratio', '')} |"
            )
        lines.append("")
    return "\n".join(lines)


def rows_by_shape(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return by shape and implementation the row of forward and backward together."""
    machine = {key for key in rows[0] if key in MACHINE}
    measured = [{key: value for key, value in row.items() if key not in machine} for row in rows]
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for shape, impl, modes in grouped(measured):
        groups.setdefault(shape, {})[impl] = modes[-1]
    return groups


def number(value: float) -> str:
    """Three digits, thousands parted."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# In short ---------------------------------------------------------------------------------------------------


def ratios() -> str:
    """Stages first, then operations, each against its peers; losing cases are among them."""
    parts: list[str] = []
    for device in ("cuda", "cpu"):
        stages, operations = stage_results(device), operation_results(device)
        if stages:
            parts += stages_in_short(stages, device)
        if operations:
            parts += operations_in_short(operations, device)
    return "\n".join(parts)


def stages_in_short(stages: dict[str, dict[str, Any]], device: str) -> list[str]:
    """Return a line for each of srcfast's implementations against each peer, and one for all four stages together."""
    lines = [
        "| stage | srcfast | peer | times as fast | rates | extra memory, of the peer's | MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in stages.items():
        for shape, rows in by_shape(result).items():
            # `way`: the key of an implementation in committed results, as in all rows below.
            ours, peers = ([row for row in rows if row["way"].startswith(OURS) == is_ours] for is_ours in (True, False))
            title = f"{name}: {shape}" if len(by_shape(result)) > 1 else name
            for our_row, peer in product(ours, peers):
                rates = [row["per_second"] for row in (our_row, peer)]
                memory = [row["extra_mebibytes"] for row in (our_row, peer)]
                impl = our_row["way"].removeprefix(OURS).removeprefix(", ") or "as it comes"
                cells = [title, impl, peer["way"], f"**{rates[0] / rates[1]:.1f}**"]
                cells += [f"{number(rates[0])}, {number(rates[1])} {result['unit']}/s"]
                cells += [f"{memory[0] / max(memory[1], 1.0):.2f}", f"{memory[0]:.0f}, {memory[1]:.0f}"]
                lines.append(f"| {' | '.join(cells)} |")
    if set(STAGES) <= set(stages):
        rates = through_all(stages)
        cells = ["**a sample through all four**", "the one that does all of the work", "the fastest of each"]
        cells += [f"**{rates[0] / rates[1]:.1f}**", f"{number(rates[0])}, {number(rates[1])} samples/s", "", ""]
        lines.insert(2, f"| {' | '.join(cells)} |")
    machines = [result["machine"] for result in stages.values()]
    return [*lines, "", f"On {where(machines[0], device, *machines[1:])}", ""]


def operations_in_short(operations: dict[str, list[dict[str, Any]]], device: str) -> list[str]:
    """A line an operation and shape: time and memory as shares of PyTorch's (or transformers'), and of the fastest peer's."""
    lines = [
        "| operation | shape | time, of PyTorch's | memory, of PyTorch's | fastest other implementation | time, of its |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in operations.items():
        for shape, implementations in rows_by_shape(rows).items():
            good = {
                impl: row for impl, row in implementations.items() if not row.get("failed") and row["limit"] != "True"
            }
            ours = good.get(OURS)
            others = {impl: float(row["milliseconds"]) for impl, row in good.items() if not impl.startswith(OURS)}
            if ours is None or not others:
                continue
            fastest = min(others, key=lambda impl: others[impl])
            share = float(ours["milliseconds"]) / others[fastest]
            shown = f"{share:.2f}" + (" (loses)" if share > 1.0 else "")
            memory = ours.get("memory_ratio") or ""
            cells = [name, shape, f"{float(ours['time_ratio']):.2f}", memory and f"{float(memory):.2f}", fastest, shown]
            lines.append(f"| {' | '.join(cells)} |")
    machine = next(iter(operations.values()))[0]
    return [*lines, "", f"On {where(machine, device)}", ""]


# The README's section ---------------------------------------------------------------------------------------


def headline(result: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return srcfast's row that does all of a stage's work, and that of the fastest peer, both at the first shape."""
    rows = next(iter(by_shape(result).values()))
    ours = next(row for row in rows if row["way"] == result["headline"])
    peers = [row for row in rows if not row["way"].startswith(OURS)]
    return ours, max(peers, key=lambda row: row["samples_per_second"])


def through_all(stages: dict[str, dict[str, Any]]) -> list[float]:
    """Samples per second through all stages one after the other: srcfast's, and the fastest peers'."""
    pairs = [headline(stages[name]) for name in STAGES]
    return [1 / sum(1 / pair[side]["samples_per_second"] for pair in pairs) for side in (0, 1)]


def performance() -> str:
    """The README's section between its two marks: a line for each stage of the LLaVA on each device that was measured."""
    parts: list[str] = []
    for device in ("cuda", "cpu"):
        stages = {name: result for name, result in stage_results(device).items() if name in STAGES}
        if not stages:
            continue
        parts += [
            "| stage | srcfast, samples/s | fastest peer, samples/s | times as fast |",
            "| --- | --- | --- | --- |",
        ]
        for name, result in stages.items():
            ours, peer = headline(result)
            rates = [row["samples_per_second"] for row in (ours, peer)]
            impl = ours["way"].removeprefix(OURS).removeprefix(", ")
            cells = [f"{name}, {impl}" if impl else name, number(rates[0]), f"{number(rates[1])} ({peer['way']})"]
            parts.append(f"| {' | '.join(cells)} | {rates[0] / rates[1]:.1f} |")
        if set(STAGES) <= set(stages):
            rates = through_all(stages)
            parts.append(f"| **all four** | {number(rates[0])} | {number(rates[1])} | **{rates[0] / rates[1]:.1f}** |")
        machines = [result["machine"] for result in stages.values()]
        parts += ["", f"On {where(machines[0], device, *machines[1:])}", ""]
    if not operation_results("cuda"):
        parts.append(on_a_gpu())
    return "\n".join(parts).rstrip() + "\n"


def readme() -> str:
    """The README with its sections as the results have them."""
    text = between(README.read_text(encoding="utf-8"), BEGIN, END, performance())
    return between(text, STUDY_BEGIN, STUDY_END, readme_tables())


def study_page() -> str:
    """docs/results.md with the study's tables as its result has them."""
    return between(STUDY_PAGE.read_text(encoding="utf-8"), STUDY_BEGIN, STUDY_END, results_tables())


def between(text: str, begin: str, end: str, part: str) -> str:
    """Return a text with another part between two marks."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{part}\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
    STUDY_PAGE.write_text(study_page(), encoding="utf-8")
