"""The page's pictures: matplotlib figures as inline SVG in the page's colours, in light, dark and print."""

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

# A colour that matplotlib draws with -> the style sheet's variable that stands for it in the page.
INK, SOFT, RULE, PAPER = "#010101", "#010102", "#010103", "#010104"
BLUE, ORANGE, GREEN, RED, VIOLET, GRAY = "#010111", "#010112", "#010113", "#010114", "#010115", "#010116"
VARIABLES = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    RED: "var(--red)",
    VIOLET: "var(--violet)",
    GRAY: "var(--gray)",
}
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
    "text.parse_math": False,  # names out of files are text, dollar signs included
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
WIDTH = 10.4  # inches; the page scales it to its own width


def can_plot() -> bool:
    """Whether matplotlib can be imported. One built for another NumPy raises more than ImportError."""
    try:
        import matplotlib.figure  # noqa: F401
    except Exception:
        return False
    return True


def page_style() -> AbstractContextManager[Any]:
    """Within: matplotlib draws in the page's style; nothing of it stays behind."""
    if not can_plot():
        return nullcontext()
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _axes(columns: int, rows: int, height: float, name: str, **options: Any) -> tuple[Any, np.ndarray]:
    """A figure with `rows` x `columns` axes, rows of `height` inches."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = name  # ids differ among the figures of a page, and never between two runs
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for one in axes.flat:
        one.patch.set_alpha(0.0)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    """The figure as an SVG element without namespaces and metadata, in the page's colours and letters."""
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
    for sentinel, variable in VARIABLES.items():
        text = text.replace(sentinel, variable)
    # matplotlib escapes what it writes: the one text of the page that is markup beside the templates.
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))


def _legend(one: Any) -> None:
    """A legend where something has a label."""
    if one.get_legend_handles_labels()[0]:
        one.legend(fontsize=9)


def _model_label(model: str) -> str:
    return model.replace("iteration-", "iteration\n")


def progress_plot(run: RunFiles) -> str:
    """Accuracy and alignment of each model, one panel a split, bars for the 95 % intervals. Empty without evaluations."""
    splits, models = run.splits, run.models
    if not splits:
        return ""
    columns = min(3, len(splits))
    figure, axes = _axes(columns, math.ceil(len(splits) / columns), 3.1, "progress", sharey=True)
    for (dataset, split), one in zip(splits, axes.flat, strict=False):
        for offset, (key, label, colour) in enumerate(
            (("accuracy", "accuracy", BLUE), ("alignment", "alignment", ORANGE))
        ):
            points = []
            for place, model in enumerate(models):
                row = run.evaluation(model, dataset, split)
                if row is not None and row.get(key) is not None:
                    low, high = row.get(f"{key}_ci95") or (row[key], row[key])
                    points.append((place + 0.06 * (offset - 0.5), row[key], row[key] - low, high - row[key]))
            if points:
                x, y, below, above = np.array(points).T
                errors = 100 * np.maximum([below, above], 0.0)
                one.errorbar(x, 100 * y, errors, fmt="o-", color=colour, capsize=3, markersize=5, label=label)
        one.set_title(f"{dataset}, {split}")
        one.set_xticks(range(len(models)), [_model_label(model) for model in models])
        one.set_xlim(-0.4, len(models) - 0.6)
    for one in axes.flat[len(splits) :]:
        one.set_axis_off()
    for one in axes[:, 0]:
        one.set_ylabel("% of samples")
    _legend(axes[0, 0])
    return _svg(figure, "accuracy and alignment by model")


def cases_plot(run: RunFiles) -> str:
    """The four cases as shares of the samples, one panel a split. Empty where no rationale was judged."""
    splits = [one for one in run.splits if any(_cases(run, model, *one) for model in run.models)]
    if not splits:
        return ""
    columns = min(3, len(splits))
    rows = math.ceil(len(splits) / columns)
    figure, axes = _axes(columns, rows, 0.9 + 0.42 * len(run.models), "cases", sharex=True, sharey=True)
    for (dataset, split), one in zip(splits, axes.flat, strict=False):
        one.grid(False)
        for place, model in enumerate(run.models):
            cases = _cases(run, model, dataset, split)
            total, left = max(1, sum(cases.values())), 0.0
            for key, label, colour in CASES:
                share = 100 * cases.get(key, 0) / total
                one.barh(place, share, left=left, color=colour, height=0.66, label=label if place == 0 else None)
                if share >= 7:
                    one.text(
                        left + share / 2,
                        place,
                        f"{share:.0f}",
                        ha="center",
                        va="center",
                        color=PAPER,
                        fontsize=9,
                    )
                left += share
        one.set_yticks(range(len(run.models)), run.models)
        one.set_title(f"{dataset}, {split}")
        one.set_xlim(0, 100)
        one.spines["left"].set_visible(False)
        one.tick_params(axis="y", length=0)
    axes[0, 0].invert_yaxis()
    for one in axes.flat[len(splits) :]:
        one.set_axis_off()
    for one in axes[-1]:
        one.set_xlabel("% of samples")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    return _svg(figure, "the four cases by model")


def _cases(run: RunFiles, model: str, dataset: str, split: str) -> dict[str, int]:
    return (run.evaluation(model, dataset, split) or {}).get("cases") or {}


def training_plot(run: RunFiles) -> str:
    """Loss of every training stage, and the reward margin and accuracy of the preference rounds. Empty without training."""
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
    for one, title in ((loss, "loss"), (margin, "reward margin"), (accuracy, "pairs ranked right, %")):
        one.set_title(title)
        one.set_xlabel("step, as a share of its stage")
    loss.set_ylim(bottom=0)
    _legend(loss)
    return _svg(figure, "loss, reward margin and reward accuracy")


def rewards_plot(run: RunFiles) -> str:
    """Chosen and rejected rewards over each preference round. Empty where there was none."""
    stages = [stage for stage in run.training_stages if stage.endswith("/dpo")]
    if not stages:
        return ""
    figure, axes = _axes(len(stages), 1, 2.7, "rewards", sharey=True)
    for stage, one in zip(stages, axes[0], strict=True):
        rows = run.training(stage)
        _curve(one, rows, "chosen_reward", GREEN, "chosen")
        _curve(one, rows, "rejected_reward", RED, "rejected")
        one.axhline(0, color=SOFT, linewidth=0.8)
        one.set_title(stage.removesuffix("/dpo"))
        one.set_xlabel("step, as a share of its stage")
    axes[0, 0].set_ylabel("reward (nats x beta)")
    _legend(axes[0, 0])
    return _svg(figure, "rewards of chosen and rejected responses")


def _curve(one: Any, rows: Sequence[dict[str, Any]], key: str, colour: str, label: str, scale: float = 1.0) -> None:
    """The smoothed values, the raw ones behind them in a light line; the x axis runs from 0 to 1."""
    values = scale * np.array([row[key] for row in rows if row.get(key) is not None], dtype=float)
    if not len(values):
        return
    x = (np.arange(len(values)) + 1) / len(values)
    window = max(1, len(values) // 20)
    one.plot(x, values, color=colour, alpha=0.25, linewidth=0.9)
    one.plot(x, _smooth(values, window), color=colour, label=label)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over 2 * window - 1 values, over what there is of them at the ends."""
    kernel = np.ones(min(2 * window - 1, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def histograms_plot(run: RunFiles) -> str:
    """Scores and confidences of all judged candidates, by iteration. Empty where nothing was judged."""
    funnels = run.summary.get("funnel", {})
    if not any("score_histogram" in funnel for funnel in funnels.values()):
        return ""
    figure, axes = _axes(2, 1, 2.7, "histograms")
    panels = (
        ("score_histogram", "score of a candidate"),
        ("confidence_histogram", "confidence of a comparison"),
    )
    for one, (key, title) in zip(axes[0], panels, strict=True):
        for (name, funnel), colour in zip(funnels.items(), _colours(len(funnels)), strict=True):
            histogram = funnel.get(key)
            if histogram and sum(histogram["counts"]):
                shares = 100 * np.array(histogram["counts"]) / sum(histogram["counts"])
                one.stairs(shares, histogram["edges"], color=colour, fill=True, alpha=0.15)
                one.stairs(shares, histogram["edges"], color=colour, label=name, linewidth=1.6)
        one.set_title(title)
        one.set_xlim(0, 1)
        one.set_ylabel("% of them")
    _legend(axes[0, 0])
    return _svg(figure, "histograms of scores and confidences")


def headroom_plot(run: RunFiles) -> str:
    """From pass@1 to pass@N, and where the R-Scorer's pick and the next model lie. Empty without headroom."""
    rows = run.summary.get("headroom", [])
    if not rows:
        return ""
    figure, axes = _axes(1, 1, 0.9 + 0.45 * len(rows), "headroom")
    one = axes[0, 0]
    one.grid(True, axis="x")
    one.grid(False, axis="y")
    marks = (
        ("pass_at_1", "pass@1", "o", GRAY, 9, 1),
        ("best_of_n", "best of N, the R-Scorer's pick", "D", BLUE, 8, 1),
        ("pass_at_n", "pass@N", "o", GREEN, 9, 1),
        ("next_pass_at_1", "next model's pass@1", "|", ORANGE, 17, 3),
    )
    for place, row in enumerate(rows):
        ends = [100 * row["pass_at_1"], 100 * row["pass_at_n"]]
        one.plot(ends, [place, place], color=RULE, linewidth=6, solid_capstyle="round", zorder=1)
    for key, label, mark, colour, size, edge in marks:
        values = [math.nan if row.get(key) is None else 100 * row[key] for row in rows]
        one.plot(values, range(len(rows)), mark, color=colour, markersize=size, markeredgewidth=edge, label=label)
    one.set_yticks(
        range(len(rows)), [f"iteration {row['iteration']}: {row['dataset']}, {row['split']}" for row in rows]
    )
    one.set_ylim(len(rows) - 0.4, -0.6)
    one.set_xlabel("% of samples right and aligned")
    one.spines["left"].set_visible(False)
    one.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=4, fontsize=9)
    return _svg(figure, "headroom")


def _colours(count: int) -> list[str]:
    return [SERIES[index % len(SERIES)] for index in range(count)]
