"""Draw the page's plots: matplotlib figures as inline SVG that uses the page's colours, in light, dark and print."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from markupsafe import Markup

from srcfast.report.run_files import RunFiles

# matplotlib draws with these colours, and `_svg` replaces each by a variable of the style sheet: plots follow the page's theme.
INK, SOFT, RULE, PAPER = "#010101", "#010102", "#010103", "#010104"
BLUE, ORANGE, GREEN, RED, VIOLET, GRAY = "#010111", "#010112", "#010113", "#010114", "#010115", "#010116"
COLOURS = (INK, SOFT, RULE, PAPER, BLUE, ORANGE, GREEN, RED, VIOLET, GRAY)
VARIABLES = ("ink", "soft", "rule", "paper", "blue", "orange", "green", "red", "violet", "gray")
SERIES = (BLUE, ORANGE, GREEN, VIOLET, RED, GRAY)
CASES = (
    ("both_right", "answer and rationale right", GREEN),
    ("right_answer_wrong_rationale", "right answer, wrong rationale", ORANGE),
    ("right_rationale_wrong_answer", "right rationale, wrong answer", BLUE),
    ("both_wrong", "both wrong", GRAY),
)
CASE_NAMES = {key: label for key, label, _ in CASES}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names from files may hold dollar signs
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
WIDTH = 10.4  # inches; the page scales the figure to its width


def can_plot() -> bool:
    """Return whether matplotlib can be imported; one built for another NumPy raises other errors than ImportError."""
    try:
        import matplotlib.figure  # noqa: F401
    except Exception:
        return False
    return True


def page_style() -> AbstractContextManager[Any]:
    """Return a context in which matplotlib draws in the page's style; it restores matplotlib's settings."""
    if not can_plot():
        return nullcontext()
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _axes(columns: int, rows: int, height: float, name: str, **options: Any) -> tuple[Any, np.ndarray]:
    """Create a figure with `rows` x `columns` axes, each row `height` inches high."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = name  # ids differ between figures, and are the same in each rendering
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for panel in axes.flat:
        panel.patch.set_alpha(0.0)
    return figure, axes


def _split_axes(splits: Sequence[tuple[str, str]], height: float, name: str, **options: Any) -> tuple[Any, np.ndarray]:
    """Create a figure with an axes per split, under its name, in rows of three; `height` inches a row."""
    columns = min(3, len(splits))
    figure, axes = _axes(columns, math.ceil(len(splits) / columns), height, name, **options)
    for (dataset, split), panel in zip(splits, axes.flat, strict=False):
        panel.set_title(f"{dataset}, {split}")
    for panel in axes.flat[len(splits) :]:
        panel.set_axis_off()
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    """Write a figure as an SVG element without namespaces and metadata, in the page's colours and font."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", text)
    text = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|legend|\w+Collection)_\d+"',
        "",
        text,
    )
    text = re.sub(r"(font: [^;\"']*?)'[^;\"]*", r"\1system-ui, sans-serif", text)
    for colour, variable in zip(COLOURS, VARIABLES, strict=True):
        text = text.replace(colour, f"var(--{variable})")
    # Markup, so that the templates don't escape it: matplotlib has escaped the texts within.
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))


def _legend(axes: Any) -> None:
    """Add a legend if something has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9)


def progress_plot(run: RunFiles) -> str:
    """Plot accuracy and alignment of each model with 95 % intervals, one panel per split. Empty without evaluations."""
    splits, models = run.splits, run.models
    if not splits:
        return ""
    figure, axes = _split_axes(splits, 3.1, "progress", sharey=True)
    for (dataset, split), panel in zip(splits, axes.flat, strict=False):
        for offset, (key, colour) in enumerate((("accuracy", BLUE), ("alignment", ORANGE))):
            points = []
            for position, model in enumerate(models):
                row = run.evaluation(model, dataset, split)
                if row is not None and row.get(key) is not None:
                    low, high = row.get(f"{key}_ci95") or (row[key], row[key])
                    points.append((position + 0.06 * (offset - 0.5), row[key], row[key] - low, high - row[key]))
            if points:
                x, y, below, above = np.array(points).T
                errors = 100 * np.maximum([below, above], 0.0)
                panel.errorbar(x, 100 * y, errors, fmt="o-", color=colour, capsize=3, markersize=5, label=key)
        panel.set_xticks(range(len(models)), [model.replace("iteration-", "iteration\n") for model in models])
        panel.set_xlim(-0.4, len(models) - 0.6)
    for panel in axes[:, 0]:
        panel.set_ylabel("% of samples")
    _legend(axes[0, 0])
    return _svg(figure, "accuracy and alignment by model")


def cases_plot(run: RunFiles) -> str:
    """Plot the four cases as shares of the samples, one panel per split. Empty if no rationale was verified."""
    splits = [split for split in run.splits if any(_cases(run, model, *split) for model in run.models)]
    if not splits:
        return ""
    figure, axes = _split_axes(splits, 0.9 + 0.42 * len(run.models), "cases", sharex=True, sharey=True)
    for (dataset, split), panel in zip(splits, axes.flat, strict=False):
        panel.grid(False)
        for position, model in enumerate(run.models):
            cases = _cases(run, model, dataset, split)
            total, left = max(1, sum(cases.values())), 0.0
            for key, label, colour in CASES:
                share = 100 * cases.get(key, 0) / total
                panel.barh(
                    position, share, left=left, color=colour, height=0.66, label=label if position == 0 else None
                )
                if share >= 7:
                    middle, text = left + share / 2, f"{share:.0f}"
                    panel.text(middle, position, text, ha="center", va="center", color=PAPER, fontsize=9)
                left += share
        panel.set_yticks(range(len(run.models)), run.models)
        panel.set_xlim(0, 100)
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
    axes[0, 0].invert_yaxis()
    for panel in axes[-1]:
        panel.set_xlabel("% of samples")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    return _svg(figure, "the four cases by model")


def _cases(run: RunFiles, model: str, dataset: str, split: str) -> dict[str, int]:
    return (run.evaluation(model, dataset, split) or {}).get("cases") or {}


def training_plot(run: RunFiles) -> str:
    """Plot the loss of each training stage, and reward margin and accuracy of the DPO rounds. Empty without training."""
    stages = run.training_stages
    if not stages:
        return ""
    preference = [stage for stage in stages if stage.endswith("/dpo")]
    figure, axes = _axes(3, 1, 2.9, "training")
    loss, margin, accuracy = axes[0]
    for stage in stages:
        if stage not in preference:
            _curve(loss, run.training(stage), "loss", GRAY, stage)
    for stage, colour in zip(preference, _colours(len(preference)), strict=True):
        rows, label = run.training(stage), stage.removesuffix("/dpo")
        _curve(loss, rows, "loss", colour, label)
        _curve(margin, rows, "margin", colour, label)
        _curve(accuracy, rows, "reward_accuracy", colour, label, scale=100)
    margin.axhline(0, color=SOFT, linewidth=0.8)
    for panel, title in ((loss, "loss"), (margin, "reward margin"), (accuracy, "pairs ranked right, %")):
        panel.set_title(title)
        panel.set_xlabel("step, as a share of its stage")
    loss.set_ylim(bottom=0)
    _legend(loss)
    return _svg(figure, "loss, reward margin and reward accuracy")


def rewards_plot(run: RunFiles) -> str:
    """Plot chosen and rejected rewards over each DPO round. Empty without DPO."""
    stages = [stage for stage in run.training_stages if stage.endswith("/dpo")]
    if not stages:
        return ""
    figure, axes = _axes(len(stages), 1, 2.7, "rewards", sharey=True)
    for stage, panel in zip(stages, axes[0], strict=True):
        rows = run.training(stage)
        _curve(panel, rows, "chosen_reward", GREEN, "chosen")
        _curve(panel, rows, "rejected_reward", RED, "rejected")
        panel.axhline(0, color=SOFT, linewidth=0.8)
        panel.set_title(stage.removesuffix("/dpo"))
        panel.set_xlabel("step, as a share of its stage")
    axes[0, 0].set_ylabel("reward (nats x beta)")
    _legend(axes[0, 0])
    return _svg(figure, "rewards of chosen and rejected responses")


def _curve(axes: Any, rows: Sequence[dict[str, Any]], key: str, colour: str, label: str, scale: float = 1.0) -> None:
    """Plot values over steps, scaled to 0 to 1: smoothed in a dark line, raw in a light one."""
    values = scale * np.array([row[key] for row in rows if row.get(key) is not None], dtype=float)
    if not len(values):
        return
    x = (np.arange(len(values)) + 1) / len(values)
    window = max(1, len(values) // 20)
    axes.plot(x, values, color=colour, alpha=0.25, linewidth=0.9)
    axes.plot(x, _smooth(values, window), color=colour, label=label)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred running mean over 2 * window - 1 values, over fewer at both ends. [n] -> [n]."""
    kernel = np.ones(min(2 * window - 1, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def histograms_plot(run: RunFiles) -> str:
    """Plot histograms of scores and confidences by iteration. Empty if nothing was scored."""
    funnels = run.summary.get("funnel", {})
    if not any("score_histogram" in funnel for funnel in funnels.values()):
        return ""
    figure, axes = _axes(2, 1, 2.7, "histograms")
    panels = (
        ("score_histogram", "score of a candidate"),
        ("confidence_histogram", "confidence of a comparison"),
    )
    for panel, (key, title) in zip(axes[0], panels, strict=True):
        for (name, funnel), colour in zip(funnels.items(), _colours(len(funnels)), strict=True):
            histogram = funnel.get(key)
            if histogram and sum(histogram["counts"]):
                shares = 100 * np.array(histogram["counts"]) / sum(histogram["counts"])
                panel.stairs(shares, histogram["edges"], color=colour, fill=True, alpha=0.15)
                panel.stairs(shares, histogram["edges"], color=colour, label=name, linewidth=1.6)
        panel.set_title(title)
        panel.set_xlim(0, 1)
        panel.set_ylabel("%")
    _legend(axes[0, 0])
    return _svg(figure, "histograms of scores and confidences")


def headroom_plot(run: RunFiles) -> str:
    """Plot pass@1, pass@N, best of N and the next model's pass@1. Empty without headroom."""
    rows = run.summary.get("headroom", [])
    if not rows:
        return ""
    figure, axes = _axes(1, 1, 0.9 + 0.45 * len(rows), "headroom")
    panel = axes[0, 0]
    panel.grid(True, axis="x")
    panel.grid(False, axis="y")
    marks = (
        ("pass_at_1", "pass@1", "o", GRAY, 9, 1),
        ("best_of_n", "best of N, the R-Scorer's pick", "D", BLUE, 8, 1),
        ("pass_at_n", "pass@N", "o", GREEN, 9, 1),
        ("next_pass_at_1", "next model's pass@1", "|", ORANGE, 17, 3),
    )
    for position, row in enumerate(rows):
        ends = [100 * row["pass_at_1"], 100 * row["pass_at_n"]]
        panel.plot(ends, [position, position], color=RULE, linewidth=6, solid_capstyle="round", zorder=1)
    for key, label, mark, colour, size, edge in marks:
        values = [math.nan if row.get(key) is None else 100 * row[key] for row in rows]
        panel.plot(values, range(len(rows)), mark, color=colour, markersize=size, markeredgewidth=edge, label=label)
    panel.set_yticks(
        range(len(rows)), [f"iteration {row['iteration']}: {row['dataset']}, {row['split']}" for row in rows]
    )
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlabel("% of samples right and aligned")
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=4, fontsize=9)
    return _svg(figure, "headroom")


def _colours(count: int) -> list[str]:
    return [SERIES[index % len(SERIES)] for index in range(count)]
