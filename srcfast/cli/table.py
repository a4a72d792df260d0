"""Build and print tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from srcfast.data.answer_rules import rule_text
from srcfast.errors import printable

MOST_SHOWN = 20  # categories of a column in the table of results


def table(title: str, rows: Sequence[Sequence[str]], header: bool = False) -> None:
    """Print a table; markup in cells is printed, not interpreted.

    Args:
        header: the first row has the names of the columns.
    """
    output = Table(title=Text(title), show_header=header)
    if header:
        for name in rows[0]:
            output.add_column(Text(name))
    for row in rows[1:] if header else rows:
        output.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(output)


def results_table(summary: dict[str, Any]) -> Table:
    """Build a table of a `summary.json`, with a row per dataset and model: percent, with half of the 95 % interval."""
    table = Table(title="Held-out results, % (± half of the 95 % interval)", box=SIMPLE_HEAD)
    table.add_column("set (samples), model", no_wrap=True)
    for heading in ("accuracy", "aligned", "right, wrong rationale", "unparsed"):
        table.add_column(heading, justify="right")
    entries = summary["evaluations"]
    for dataset, split in dict.fromkeys((entry["dataset"], entry["split"]) for entry in entries):
        rows = [entry for entry in entries if (entry["dataset"], entry["split"]) == (dataset, split)]
        table.add_row(Text(printable(f"{dataset} {split} ({rows[0]['n']})"), style="bold"))
        if rule := rule_text(rows[0]):
            table.add_row(Text(rule, style="dim"))
        for entry in rows:
            table.add_row(
                Text(printable(f"  {entry['model']}")),  # Text: rich must not interpret markup in a name
                _share(entry["accuracy"], entry["accuracy_ci95"]),
                _share(entry["alignment"], entry.get("alignment_ci95")),
                _share(entry["right_answer_wrong_rationale"], None),
                str(entry["unparsed"]),
            )
            if scores := entry.get("scores"):
                table.add_row(Text(printable(f"    {_figures(scores)}"), style="dim"))
            for values in entry.get("by_category", {}).values():
                for value, group in list(values.items())[:MOST_SHOWN]:
                    figures = f"; {_figures(group['scores'])}" if group.get("scores") else ""
                    label = Text(printable(f"    {value} ({group['n']}){figures}"), style="dim")
                    table.add_row(label, _share(group["accuracy"], group.get("accuracy_ci95")))
                if len(values) > MOST_SHOWN:
                    table.add_row(Text(f"    and {len(values) - MOST_SHOWN} more in summary.json", style="dim"))
        table.add_section()
    return table


def _figures(scores: Mapping[str, float]) -> str:
    """Write a rule's figures in percent."""
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())


def _share(value: float | None, interval: list[float] | None) -> str:
    """Format a share in percent, ± half of its interval."""
    if value is None:
        return "-"
    text = f"{100 * value:.1f}"
    return text if interval is None else f"{text} ± {50 * (interval[1] - interval[0]):.1f}"
