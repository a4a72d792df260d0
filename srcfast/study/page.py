"""Render a study's page: its tables, and samples that two arms answer differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import write_text
from srcfast.report.gallery import Picture, embedded_image
from srcfast.report.page import templates
from srcfast.stages.datasets import read_evaluation_sets
from srcfast.study.results import CAPTIONS, arms_table, differences_table, percent, read_predictions
from srcfast.study.settings import JUDGED, Study

EXAMPLES = 2  # of each evaluation set


@dataclass(frozen=True)
class Example:
    """A sample, and what two arms answer to it."""

    set: str
    question: str
    answer: str
    pictures: list[Picture]
    responses: list[tuple[str, str, bool]]  # arm, text, whether it is aligned


def write_page(study: Study, summary: Mapping[str, Any], path: Path) -> None:
    """Write the page of a finished study."""
    seeds, arms = study.settings.seeds, len(study.settings.arms)
    tables = [
        ("Arms", CAPTIONS[0], arms_table(summary)),
        ("Differences", CAPTIONS[1], differences_table(summary)),
        ("R-Scorers", "Percent of pairs in which the R-Scorer agrees with the oracle.", _judges_table(summary)),
    ]
    html = (
        templates()
        .get_template("study.html")
        .render(
            name=study.settings.name,
            subtitle=[f"{arms} arms", f"{seeds} seed{'s' if seeds > 1 else ''}"],
            tables=[table for table in tables if len(table[2]) > 1],
            compared=study.pairs[0] if study.pairs else (),
            examples=_examples(study, *study.pairs[0]) if study.pairs else [],
        )
    )
    write_text(path, html)


def _judges_table(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [["R-Scorer", "reference", "pairwise", "independent"]]
    for size, qualities in summary["judges"].items():
        for quality, modes in qualities.items():
            cells = [percent(modes[mode]) for mode in JUDGED]
            rows.append([size, quality, *cells])
    return rows


def _examples(study: Study, after: str, before: str) -> list[Example]:
    """Return the first samples of each evaluation set of which one of two arms is aligned, under the first seed."""
    config = study.configs[after, 0]
    rows = {arm: read_predictions(study.configs[arm, 0], study.model(arm)) for arm in (before, after)}
    examples = []
    for dataset in read_evaluation_sets(config.data.evaluation, config, Path(config.output) / "images", []):
        samples = {sample.id: sample for sample in dataset.samples}
        pairs = zip(*(rows[arm].get(dataset.label, []) for arm in (before, after)), strict=True)
        differing = [pair for pair in pairs if pair[0]["aligned"] != pair[1]["aligned"] and pair[0]["id"] in samples]
        for pair in differing[:EXAMPLES]:
            sample = samples[pair[0]["id"]]
            pictures = [embedded_image(Path(sample.image_root) / name) for name in sample.images]
            examples.append(
                Example(
                    dataset.label,
                    sample.question,
                    sample.answer,
                    [picture for picture in pictures if picture is not None],
                    [(arm, row["text"], bool(row["aligned"])) for arm, row in zip((before, after), pair, strict=True)],
                )
            )
    return examples
