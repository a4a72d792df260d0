"""How often is a guess right that never sees the picture? The most frequent training answer of each kind of question.

    python benchmarks/blind_guess.py benchmarks/study/main.yaml --output benchmarks/results/study/blind.json

For each seed of a study and each evaluation set with its own pictures: the answer that is most frequent among the training
questions of the same format and kind, or of the same format where no training question is of that kind. All that it has of a
question is its kind (`extra.kind`), which models have to read from the words. The result has {"accuracy": [mean, low, high],
"sets": {SET: {"accuracy": [mean, low, high]}}}, with the sets and the intervals of the study's summary.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from srcfast.config.datasets import DatasetConfig
from srcfast.config.settings import Config
from srcfast.data.answers import is_right
from srcfast.data.jsonl import write_json
from srcfast.data.records import Sample
from srcfast.stages.datasets import read_dataset
from srcfast.study.results import Outcomes, interval
from srcfast.study.settings import read_study

Answers = Mapping[
    tuple[str, str | None], Counter[str]
]  # (format, kind of question or None for all) -> training answers


def main(
    path: Annotated[Path, typer.Argument(metavar="STUDY", help="the study's file")],
    output: Annotated[Path, typer.Option(help="result file")],
) -> None:
    """Guess under each seed, and write the result file."""
    study = read_study(path)
    arm = next(iter(study.settings.arms))
    with tempfile.TemporaryDirectory() as images:
        first, folder = study.configs[arm, 0].data.evaluation, Path(images)
        sets = [(each, read_dataset(each, folder, [])) for each in first if each.images == "given"]
        rights = [guessed(study.configs[arm, seed], sets, folder) for seed in range(study.settings.seeds)]
    outcomes = {name: np.stack([right[name] for right in rights]) for name in rights[0]}
    resamples = study.settings.resamples
    figures = {name: {"accuracy": interval({name: of_set}, resamples)} for name, of_set in outcomes.items()}
    result: dict[str, Any] = {"command": " ".join(["python benchmarks/blind_guess.py", *sys.argv[1:]])}
    write_json(output, result | {"accuracy": interval(outcomes, resamples), "sets": figures})


def guessed(config: Config, sets: Sequence[tuple[DatasetConfig, list[Sample]]], images: Path) -> Outcomes:
    """Return by evaluation set whether the guess for each sample is right: [samples], 1.0 or 0.0."""
    answers: dict[tuple[str, str | None], Counter[str]] = {}
    for dataset in config.data.train:
        for sample in read_dataset(dataset, images, []):
            for kind in (sample.extra.get("kind"), None):
                answers.setdefault((dataset.format, kind), Counter())[sample.answer] += 1
    return {
        dataset.label: np.array([float(is_right(one, guess(one, dataset.format, answers))) for one in samples])
        for dataset, samples in sets
    }


def guess(sample: Sample, source: str, answers: Answers) -> str:
    """Return the most frequent training answer to questions like a sample's, of equally frequent ones the first that was read."""
    counts = answers.get((source, sample.extra.get("kind"))) or answers[source, None]
    return counts.most_common(1)[0][0]


if __name__ == "__main__":
    typer.run(main)
