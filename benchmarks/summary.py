"""All committed results as one page: `python -m srcfast_benchmarks.summary` writes docs/benchmarks.md."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from srcfast_benchmarks import BENCHMARKS
from srcfast_benchmarks.harness import RESULTS, grouped

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
MACHINE = ("gpu", "cpu", "threads", "torch", "git_commit", "versions")
INTRODUCTION = """# Benchmarks

Written by `python -m srcfast_benchmarks.summary` from the CSV files in `benchmarks/results/`, which `srcfast bench` writes.
Time and memory are relative to the first way of each table: less is better. Milliseconds are medians of forward and backward
together (forward where there is no backward), with the 20th and 80th percentile; memory is the peak beyond the inputs. A *limit*
does less than the operation. {missing}
"""


def page() -> str:
    """The whole page."""
    parts, seen = [], set()
    for name in BENCHMARKS:
        for device in ("cuda", "cpu"):
            file = RESULTS / f"{name}_{device}.csv"
            if file.is_file():
                seen.add(device)
                with open(file, encoding="utf-8", newline="") as lines:
                    parts.append(section(name, device, list(csv.DictReader(lines))))
    missing = (
        "" if "cuda" in seen else "No GPU was at hand so far: `srcfast bench --device cuda` is what remains to be run."
    )
    return INTRODUCTION.format(missing=missing).rstrip() + "\n\n" + "\n".join(parts)


def section(name: str, device: str, rows: list[dict[str, Any]]) -> str:
    """A benchmark on a device: a table a shape."""
    first = rows[0]
    where = first["gpu"] if device == "cuda" else f"{first['threads']} threads of {first['cpu']}"
    commit = first["git_commit"].removesuffix("-dirty")[:10]
    lines = [f"## {name}, {device}", "", f"{where}; torch {first['torch']} {first['versions']}; commit {commit}.", ""]
    machine = {key for key in first if key in MACHINE}
    own = [{key: value for key, value in row.items() if key not in machine} for row in rows]
    groups = grouped(own)
    for shape in dict.fromkeys(shape for shape, _, _ in groups):
        lines += [f"{shape}:", "", "| way | ms | time | extra MiB | memory |", "| --- | --- | --- | --- | --- |"]
        for _, way, modes in (group for group in groups if group[0] == shape):
            row = modes[-1]
            title = f"{way} (limit)" if row["limit"] == "True" else way
            if row.get("failed"):
                lines.append(f"| {title} | failed | | | |")
                continue
            taken = f"{row['milliseconds']} ({row['low']} to {row['high']})"
            lines.append(
                f"| {title} | {taken} | {row['time_ratio']} | {row['extra_mebibytes']} | {row.get('memory_ratio', '')} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
