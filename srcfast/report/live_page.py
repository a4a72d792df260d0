"""Render the page that `srcfast watch` serves: one HTML document without scripts, which a browser loads every few seconds."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from srcfast.errors import SrcfastError
from srcfast.report import plots, sections
from srcfast.report.newest_candidates import SampleCandidates, newest_candidates
from srcfast.report.page import templates
from srcfast.report.run_files import RunFiles, read_run

REFRESH = 5  # seconds
MAX_POINTS = 2000  # of a curve


def render_live(path: Path) -> str:
    """Render the state of a run that has not begun, is under way, was stopped or is done.

    Args:
        path: the run's directory. A file in it that can't be read is named on the page.
    """
    problem, run, number = "", None, 0
    newest: list[SampleCandidates] = []
    try:
        run = read_run(path, live=True)
        number, newest = newest_candidates(path)
    except (SrcfastError, OSError) as error:
        problem = str(error)
    figures = {}
    if run is not None and plots.can_plot():
        thinned = _thinned(run)
        with plots.page_style():
            figures = {
                name: draw(thinned)
                for name, draw in (("training", plots.training_plot), ("progress", plots.progress_plot))
            }
    state = None if run is None else sections.state(run)
    return (
        templates()
        .get_template("live.html")
        .render(
            name=path.resolve().name,
            refresh=REFRESH if state is not None or run is None or not run.finished else 0,
            problem=problem,
            run=run,
            state=state,
            age=0.0 if state is None else max(0.0, time.time() - state.written),
            training=[] if run is None else sections.training(run),
            splits=[] if run is None else sections.splits(run),
            can_plot=plots.can_plot(),
            figures=figures,
            round=number,
            newest=newest,
        )
    )


def _thinned(run: RunFiles) -> RunFiles:
    """Leave out rows of `metrics.jsonl` evenly, so that a plot of a long training is drawn fast."""
    metrics = []
    for stage in run.training_stages:
        rows = run.training(stage)
        metrics += rows[:: max(1, -(-len(rows) // MAX_POINTS))]
    return replace(run, metrics=metrics)
