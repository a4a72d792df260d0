"""The page that a run ends with: one HTML file that needs nothing else, no network, no scripts."""

from __future__ import annotations

from html import escape
from pathlib import Path

from srcfast.data.jsonl import write_text
from srcfast.report import plots, sections
from srcfast.report.gallery import gallery
from srcfast.report.run_files import RunFiles, read_run
from srcfast.report.style import STYLE

CHOSEN_FALLS = (
    "<p>A reward is &beta; times how much likelier the policy makes a response than the reference does. "
    "Chosen rewards may fall, and often do: DPO asks for a growing <em>difference</em>, and the two "
    "responses share many tokens, so pushing the rejected one down takes part of the chosen one with it. "
    "That is no fault while the margin grows, accuracy holds and nothing goes unparsed; "
    "<code>dpo.sft_weight</code> holds the chosen responses up.</p>"
)


def write_report(run_dir: Path) -> Path:
    """Render `report/index.html` of a run directory from the files that are there; returns its path.

    Without matplotlib the page has no plots, and says so.

    Raises:
        InputError: `summary.json` is missing, or a file is damaged.
        ConfigError: `config.yaml` is damaged.
    """
    run_dir = Path(run_dir)
    output = run_dir / "report" / "index.html"
    with plots.page_style():
        html = render(read_run(run_dir))
    write_text(output, html)
    return output


def render(run: RunFiles) -> str:
    """The page's HTML."""
    drawn = plots.can_plot()
    name = str(run.config.get("name") or run.path.resolve().name)
    parts = {
        "Results": _results(run, drawn),
        "The four cases": _cases(run, drawn),
        "Abilities": sections.abilities(run),
        "Headroom": sections.headroom(run) + _plot(plots.headroom_plot, run, drawn),
        "Training": _training(run, drawn),
        "Scores and confidences": _plot(plots.histograms_plot, run, drawn) or sections.NOT_MEASURED,
        "From candidates to pairs": sections.funnel(run),
        "Time": sections.timings(run) + sections.surroundings(run),
        "Gallery": sections.gallery_words(run) + gallery(run),
    }
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in parts)
    body = "".join(f'<section id="{_anchor(title)}"><h2>{title}</h2>{html}</section>' for title, html in parts.items())
    missing = (
        ""
        if drawn
        else "<p>This page has no plots: matplotlib is not installed or can't be imported. "
        "<code>pip install 'srcfast[report]'</code>, then <code>srcfast report</code> with this run's "
        "directory, draws them.</p>"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: self-rationale calibration</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{escape(name)}</h1><div class=soft>{_subtitle(run)}</div>{missing}{sections.tiles(run)}"
        f"<nav>{links}</nav></header>{body}</body></html>\n"
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _subtitle(run: RunFiles) -> str:
    model, environment = run.config.get("model", {}), run.environment
    told = [
        "Self-Rationale Calibration",
        f"model {model['path']}" if "path" in model else None,
        f"seed {run.config['seed']}" if "seed" in run.config else None,
        environment.get("gpu") or environment.get("cpu"),
    ]
    return " &middot; ".join(escape(str(item)) for item in told if item)


def _plot(draw: plots.Draw, run: RunFiles, drawn: bool, caption: str = "") -> str:
    return sections.figure(draw(run), caption) if drawn else ""


def _results(run: RunFiles, drawn: bool) -> str:
    plot = _plot(plots.progress_plot, run, drawn, "Bars: 95 % intervals.") if run.evaluations else ""
    return sections.headline(run) + plot + sections.method(run)


def _cases(run: RunFiles, drawn: bool) -> str:
    text = (
        "<p>An answer may be right for a wrong reason, or wrong after a right one. The oracle checks every "
        "sentence of a rationale against the scene and whether they lead to the gold answer, so the four "
        "cases are counted exactly.</p>"
    )
    return text + (_plot(plots.cases_plot, run, drawn) or sections.case_table(run))


def _training(run: RunFiles, drawn: bool) -> str:
    if not run.training_stages:
        return sections.NOT_MEASURED
    curves = _plot(plots.training_plot, run, drawn, "Light: each step. Dark: a running mean.")
    rewards = _plot(plots.rewards_plot, run, drawn)
    return sections.last_steps(run) + curves + (f"<h3>Rewards</h3>{CHOSEN_FALLS}{rewards}" if rewards else "")
