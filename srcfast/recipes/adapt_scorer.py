"""Continue an R-Scorer on the candidates of a run, whose faults the oracle counts: each policy makes other faults.

    srcfast calibrate benchmarks/study/judge_candidates.yaml
    python -m srcfast.recipes.adapt_scorer --start JUDGE --run runs/judge-candidates --output DIR

Corruptions and other bases' candidates differ from what the R-Scorer will judge: above all, few of them have the right answer by
a wrong rationale. Of each sample's candidates aligned ones are chosen first, then those, then candidates with a wrong answer. The
R-Scorer first rates a dozen alone, then compares four in both orders where one is aligned and another is not, and last does the
latter where it can and the former elsewhere: without samples whose candidates are all faulty ratings would be of use within a
sample alone. Two thirds of the trees have a reference of a quality that is drawn, the others a complete one. Every tenth sample
is held out, for temperatures and the record.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from srcfast.config.load import load_config
from srcfast.data.jsonl import write_json
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Candidate, ReferenceQuality, Sample
from srcfast.models.scorer import ALONE, load_scorer
from srcfast.models.text_model import save_text_model
from srcfast.models.verdict_temperature import CALIBRATION
from srcfast.recipes.scorer_lessons import comparing_items
from srcfast.recipes.train_scorer import TOKEN_BUDGET, Recipe, train_items
from srcfast.recipes.unfinished import check_recipe
from srcfast.run.artifacts import RunArtifacts
from srcfast.run.directory import RunDirectory
from srcfast.stages.datasets import read_dataset
from srcfast.stages.scorer_calibration import calibrate_confidence
from srcfast.stages.scorer_training import (
    ScorerExample,
    Variant,
    draw_quality,
    evaluate_scorer,
    in_each_quality,
    scorer_example,
    with_quality,
)
from srcfast.world.verification import verify_sample

HELD_OUT = 10  # every tenth sample
STAGES = ("rated", "compared", "mixed")


@dataclass(frozen=True)
class Adaptation:
    """All settings that determine what becomes of an R-Scorer and a run's candidates."""

    seed: int = 0
    rated: int = 12  # maximum number of candidates of a tree that are rated alone
    compared: int = 4  # of a tree that are compared
    passes: tuple[int, int, int] = (2, 2, 6)  # over all samples, in each of STAGES
    qualities: tuple[ReferenceQuality, ...] = ("complete", "noisy", "partial", "answer")
    complete: float = 1 / 3  # share of trees whose reference is complete in any case
    rating_learning_rate: float = 6e-4
    comparing_learning_rate: float = 4e-4


@dataclass(frozen=True)
class Written:
    """The distinct candidates of a sample: aligned ones, those with the right answer by a wrong rationale, and others."""

    sample: Sample
    aligned: list[Variant]
    right: list[Variant]
    wrong: list[Variant]

    @property
    def comparable(self) -> bool:
        """Whether there are aligned candidates and others."""
        return bool(self.aligned and (self.right or self.wrong))

    def choose(self, count: int, rng: random.Random) -> list[Variant]:
        """Choose up to `count`, half of them aligned where there are so many, then right ones, then others, in random order."""
        aligned, right, wrong = (
            rng.sample(variants, len(variants)) for variants in (self.aligned, self.right, self.wrong)
        )
        chosen = aligned[: count // 2]
        chosen += right[: max(1, (count - len(chosen) + 1) // 2)]
        others = [variant for variant in (*wrong, *right, *aligned) if variant not in chosen]
        chosen += others[: count - len(chosen)]
        return rng.sample(chosen, len(chosen))


def main(
    run: Annotated[Path, typer.Option(help="directory of the run that has written candidates")],
    output: Annotated[Path, typer.Option(help="directory for the checkpoint")],
    start: Annotated[str, typer.Option(help="directory of the R-Scorer")] = "embedded",
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train an R-Scorer further, and write it with its temperatures and TRAINING.json, the record of its training.

    A stage whose model exists in `output` is not run again.
    """
    torch.set_num_threads(threads)
    adapt_scorer(Adaptation(), start, read_run(run), output)


def read_run(directory: Path) -> list[Written]:
    """Read a run's first candidates and their samples, each with its complete reference, and count faults by the oracle."""
    config = load_config(directory / "config.yaml")
    images = Path(config.output) / "images"
    samples = {
        sample.id: sample
        for dataset in config.data.train
        if "calibration" in dataset.use
        for sample in read_dataset(dataset.replace(reference="complete"), images, [])
    }
    candidates = RunArtifacts(RunDirectory(directory), samples).candidates(1)
    groups = ((sample, candidates.get(sample.id) or []) for sample in samples.values())
    return [verified(sample, group) for sample, group in groups if group]


def verified(sample: Sample, candidates: Iterable[Candidate]) -> Written:
    """Sort a sample's distinct candidates that have rationale and answer by what the oracle finds."""
    written = Written(sample, [], [], [])
    for text in dict.fromkeys(candidate.text for candidate in candidates):
        verification = verify_sample(sample, response := parse_response(text))
        if verification is None or response.answer is None or not response.has_rationale:
            continue
        if verification.aligned:
            written.aligned.append(Variant(text, 0))
        else:
            (written.right if verification.answer_right else written.wrong).append(Variant(text, 1, "own"))
    return written


def adapt_scorer(adaptation: Adaptation, start: str, written: Sequence[Written], output: Path) -> None:
    """Train in stages, calibrate on the held-out samples, and write the checkpoint with TRAINING.json.

    Raises:
        SrcfastError: the directory holds the work of another recipe.
    """
    recipe = asdict(adaptation) | {"start": str(start), "samples": len(written)}
    check_recipe(output, recipe)
    learned = [each for number, each in enumerate(written) if number % HELD_OUT]
    held_out = written[::HELD_OUT]
    by_id = {each.sample.id: each.sample for each in learned}
    loop = Recipe(seed=adaptation.seed)
    begin = start
    for stage in STAGES:
        end = output / stage
        if not (end / "config.json").exists():
            scorer = load_scorer(begin)
            items = comparing_items(scorer, by_id, draw_examples(adaptation, learned, stage))
            rate = adaptation.rating_learning_rate if stage == "rated" else adaptation.comparing_learning_rate
            train_items(scorer, items, replace(loop, learning_rate=rate), 1)
            save_text_model(scorer.text_model, end)
        begin = str(end)
    save_text_model(load_scorer(begin, dtype=torch.bfloat16).text_model, output)
    rng = random.Random(f"held out/{adaptation.seed}")
    examples = [
        scorer_example(each.sample, each.choose(adaptation.compared, rng)) for each in held_out if each.comparable
    ]
    samples = {each.sample.id: each.sample for each in held_out}
    by_quality = in_each_quality(examples, samples, adaptation.qualities, adaptation.seed)
    write_json(output / CALIBRATION, calibrate_confidence(load_scorer(output), by_quality, TOKEN_BUDGET))
    shipped = load_scorer(output)
    record = {
        "command": "python -m srcfast.recipes.adapt_scorer --start JUDGE --run RUN --output DIR",
        "recipe": recipe,
        "held_out": {quality: evaluate_scorer(shipped, stated, TOKEN_BUDGET) for quality, stated in by_quality.items()},
        "torch": torch.__version__,
    }
    write_json(output / "TRAINING.json", record)


def draw_examples(adaptation: Adaptation, written: Sequence[Written], stage: str) -> list[ScorerExample]:
    """Draw a stage's examples; each pass draws other candidates and qualities."""
    examples = []
    for number in range(adaptation.passes[STAGES.index(stage)]):
        key = f"{stage}/{number}/{adaptation.seed}"
        rng = random.Random(key)
        for each in written:
            variants = each.choose(adaptation.rated if stage == "rated" else adaptation.compared, rng)
            if stage == "mixed" and not each.comparable:
                variants = each.choose(adaptation.rated, rng)
            if not variants or (stage == "compared" and not each.comparable):
                continue
            example = scorer_example(each.sample, variants)
            if stage == "rated" or not each.comparable:
                example = replace(example, pairs=tuple((index, ALONE) for index in range(len(variants))))
            quality: ReferenceQuality = "complete"
            if rng.random() >= adaptation.complete:
                quality = draw_quality(adaptation.qualities, f"{key}/{each.sample.id}")
            examples.append(with_quality(example, each.sample, quality, adaptation.seed))
    return examples


if __name__ == "__main__":
    typer.run(main)
