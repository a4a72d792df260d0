"""Render a run's page: one HTML file without external files, network or scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srcfast.data.jsonl import flatten, write_text
from srcfast.report import plots, sections
from srcfast.report.gallery import cards
from srcfast.report.run_files import RunFiles, read_run

if TYPE_CHECKING:
    from jinja2 import Environment

PICTURES = {
    "progress": plots.progress_plot,
    "cases": plots.cases_plot,
    "headroom": plots.headroom_plot,
    "training": plots.training_plot,
    "rewards": plots.rewards_plot,
    "histograms": plots.histograms_plot,
}


def write_report(run_dir: Path, image_roots: Iterable[Path] = ()) -> Path:
    """Render `report/index.html` of a run directory from the files that exist, and return its path; the run may not be done.

    Images are shown that lie in the run's directory or in `image_roots`. Without matplotlib the page has no plots and says so.

    Raises:
        InputError: there is no run, or a file is damaged.
        ConfigError: `config.yaml` is damaged.
    """
    run_dir = Path(run_dir)
    output = run_dir / "report" / "index.html"
    with plots.page_style():
        html = render(read_run(run_dir), image_roots)
    write_text(output, html)
    return output


def render(run: RunFiles, image_roots: Iterable[Path] | None = None) -> str:
    """Render the page's HTML; see `cards` for `image_roots`."""
    return (
        templates()
        .get_template("page.html")
        .render(
            run=run,
            name=str(run.config.get("name") or run.path.resolve().name),
            subtitle=_subtitle(run),
            state=sections.state(run),
            figures={name: draw(run) for name, draw in PICTURES.items()} if plots.can_plot() else {},
            case_names=plots.CASE_NAMES,
            headline=sections.headline(run),
            splits=sections.splits(run),
            abilities=sections.abilities(run),
            categories=sections.categories(run),
            training=sections.training(run),
            funnels=sections.funnels(run),
            rates=sections.rates(run),
            timings=sections.timings(run),
            settings=flatten(run.config),
            cards=cards(run, image_roots),
        )
    )


@cache
def templates() -> Environment:
    """Return the Jinja2 environment of the page's templates: it escapes every value, and an undefined name is an error."""
    # Imported here, since `srcfast` starts faster without it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "percent": sections.percent,
        "points": lambda change: f"{100 * change:+.1f}",
        "number": format,  # value|number(",.2f")
        "duration": sections.duration,
        "moment": sections.moment,
        "words": sections.words,
    }
    environment.filters.update(filters)
    return environment


def _subtitle(run: RunFiles) -> list[Any]:
    """Collect method, model, seed and device, as far as they are known."""
    model = run.config.get("model", {})
    parts = [
        "Self-Rationale Calibration",
        f"model {model['path']}" if "path" in model else None,
        f"seed {run.config['seed']}" if "seed" in run.config else None,
        run.environment.get("gpu") or run.environment.get("cpu"),
    ]
    return [part for part in parts if part]
