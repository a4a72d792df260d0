"""The results as a table on the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def results_table(summary: dict[str, Any]) -> Table:
    """A row for each model and evaluation set of a `summary.json`: accuracy and alignment in percent, with intervals."""
    table = Table(title="Held-out results, % (95 % interval)")
    for heading in ("dataset", "split", "model"):
        table.add_column(heading)
    for heading in ("n", "accuracy", "aligned", "right answer, wrong rationale", "unparsed"):
        table.add_column(heading, justify="right")
    entries = summary["evaluations"]
    sets = list(dict.fromkeys((entry["dataset"], entry["split"]) for entry in entries))
    for dataset, split in sets:
        own = [entry for entry in entries if (entry["dataset"], entry["split"]) == (dataset, split)]
        for place, entry in enumerate(own):
            table.add_row(
                dataset if place == 0 else "",
                split if place == 0 else "",
                entry["model"],
                str(entry["n"]),
                _share(entry["accuracy"], entry["accuracy_ci95"]),
                _share(entry["alignment"], entry.get("alignment_ci95")),
                _share(entry["right_answer_wrong_rationale"], None),
                str(entry["unparsed"]),
            )
        table.add_section()
    return table


def _share(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "-"
    text = f"{100 * value:.1f}"
    return text if interval is None else f"{text} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
