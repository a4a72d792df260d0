"""Show what a round changed: of some evaluation sets the first sample that one arm of a study aligns and another doesn't.

    python benchmarks/study_examples.py benchmarks/study/main.yaml --before rationale --after src_improved --set clips-test \\
        --set charts-test --output benchmarks/results/study/examples.json --images docs/images

The answers are those of the first seed. The result has, by set, question, gold answer, both responses, the picture's file, and
how many samples changed in either direction, so that nobody takes the example for the rule. Several frames are put side by side.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from srcfast.data.images import load_image
from srcfast.data.jsonl import replacing, write_json
from srcfast.data.records import Sample
from srcfast.errors import ConfigError
from srcfast.stages.datasets import read_dataset
from srcfast.study.results import read_predictions
from srcfast.study.settings import read_study

GAP = 4  # pixels between frames


def main(
    path: Annotated[Path, typer.Argument(metavar="STUDY", help="the study's file")],
    before: Annotated[str, typer.Option(help="arm")],
    after: Annotated[str, typer.Option(help="arm")],
    sets: Annotated[list[str], typer.Option("--set", help="evaluation set, as NAME-SPLIT; may be given again")],
    output: Annotated[Path, typer.Option(help="result file")],
    images: Annotated[Path, typer.Option(help="folder for the pictures")],
) -> None:
    """Find the examples, and write the result and the pictures."""
    study = read_study(path)
    config = study.configs[after, 0]
    answers = [read_predictions(study.configs[arm, 0], study.model(arm)) for arm in (before, after)]
    result: dict[str, Any] = {"command": " ".join(["python benchmarks/study_examples.py", *sys.argv[1:]])}
    with tempfile.TemporaryDirectory() as folder:
        for name in sets:
            [dataset] = [each for each in config.data.evaluation if each.label == name]
            samples = {sample.id: sample for sample in read_dataset(dataset, Path(folder), [])}
            pairs = list(zip(*(of_arm[name] for of_arm in answers), strict=True))
            gained = [pair for pair in pairs if pair[1]["aligned"] and not pair[0]["aligned"]]
            if not gained:
                raise ConfigError(
                    f"--set: expected one of which {after} aligns a sample that {before} doesn't, found {name}"
                )
            first, second = gained[0]
            picture = images / f"study-{name}.png"
            with replacing(picture) as file:
                side_by_side(samples[first["id"]]).save(file, "png")
            result[name] = {
                "question": samples[first["id"]].question,
                "answer": samples[first["id"]].answer,
                before: first["text"],
                after: second["text"],
                "picture": picture.name,
                "gained": len(gained),
                "lost": sum(pair[0]["aligned"] and not pair[1]["aligned"] for pair in pairs),
                "samples": len(pairs),
            }
    write_json(output, result)


def side_by_side(sample: Sample) -> Image.Image:
    """Return a sample's pictures in a row."""
    pictures = [load_image(sample.image_root, name) for name in sample.images]
    width = sum(picture.width + GAP for picture in pictures) - GAP
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + GAP
    return row


if __name__ == "__main__":
    typer.run(main)
