"""How well do R-Scorers of several sizes judge with imperfect references? Pairwise against independent, by quality.

    python benchmarks/judge_study.py --judge 2M=embedded --seeds 3
    python benchmarks/judge_study.py families=120 epochs=0 --base benchmarks/study/base-2m --judge 2M=benchmarks/study/judge-2m

For each seed: two bases are tuned on different rationales. R-Scorers, which start from the checkpoints that `--judge` names,
learn from true rationales, their corruptions, and the first base's candidates, whose faults the oracle counts; each tree's
reference has one of four qualities, which its prompt states. Temperatures are fitted on candidates of the second base for the
world's validation split, and everything is measured on those for its test split, with references made worse in the same ways.
With `epochs=0` R-Scorers are measured as they come, with the temperatures beside them; with `families=N` on N test samples of
each data family of the studies, whose candidates the base `--base` writes.

What exists in the work folder is not made again: candidates, R-Scorers, and rows, one JSON file for each seed, R-Scorer, quality
and mode. The result has agreement with the oracle on pairs of which one candidate is aligned and the other is not, as
{"judges": {SIZE: {QUALITY: {"pairwise": [mean, low, high], "independent": [...]}}}} with 95 % intervals (bootstrap over seeds,
then samples), `before` likewise of the checkpoints as they came, with prompts that call all references complete; `differences` of
the two modes, paired by sample; `coverage`: the same where the least confident pairs are left out, and how often the best-scored
candidate is aligned where the least confident samples are; and `calibration`: expected calibration errors on test candidates.
"""

from __future__ import annotations

import json
import platform
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer

from srcfast.data.jsonl import write_json
from srcfast.data.records import Candidate, ReferenceQuality, Sample
from srcfast.models.scorer import Scorer, load_scorer
from srcfast.models.text_model import save_text_model
from srcfast.models.verdict_temperature import CALIBRATION, reliability, softmax
from srcfast.recipes.families import read_family
from srcfast.recipes.scorer_lessons import checking_items, comparing_items
from srcfast.recipes.train_scorer import (
    Recipe,
    Variants,
    is_faulty,
    raps_of,
    train_items,
    tuned_candidates,
    verified_variants,
    with_generated,
)
from srcfast.run.environment import environment
from srcfast.stages.scorer_calibration import calibrate_confidence, pair_logits
from srcfast.stages.scorer_training import ScorerExample, draw_quality, scorer_example, scorer_examples, with_quality
from srcfast.stages.scoring import sample_reference, score_candidates
from srcfast.study.results import markdown
from srcfast.world.claims import VOCABULARY
from srcfast.world.degraded_references import degrade_reference
from srcfast.world.samples import world_samples

ROOT = Path(__file__).parents[1]
QUALITIES: tuple[ReferenceQuality, ...] = get_args(ReferenceQuality)
MODES = ("pairwise", "independent")
COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
TRAINED = "trained.json"  # written last
BUDGET = 16_384  # tokens of a forward pass
FRESH = 200  # added to the seed of the families' test samples: no other study draws those


@dataclass(frozen=True)
class Study:
    """Settings, which `NAME=NUMBER` changes."""

    samples: int = 2_000  # that R-Scorers learn from
    validation: int = 300
    test: int = 600
    tuned: int = 150  # samples that each base is tuned on,
    tuned_epochs: int = 8  # and how often it sees them
    candidates: int = 5
    compared: int = 3  # candidates of a tree in training
    draws: int = 2  # trees of generated candidates alone for each sample
    epochs: int = 1  # 0 = R-Scorers as they come
    families: int = 0  # test samples of each data family, in place of the world's; 0 = the world alone
    checking_epochs: int = 0  # first of the lessons that check claims alone; for a checkpoint that can't judge yet
    learning_rate: float = 4e-4


def main(
    words: Annotated[list[str] | None, typer.Argument(help="settings that differ, NAME=NUMBER")] = None,
    judge: Annotated[
        list[str] | None, typer.Option(help="SIZE=CHECKPOINT, or SIZE=embedded; may be given again")
    ] = None,
    seeds: Annotated[int, typer.Option(help="number of seeds, from 0")] = 3,
    work: Annotated[Path, typer.Option(help="folder for what is made on the way")] = Path("runs/judges"),
    output: Annotated[Path, typer.Option(help="result file")] = ROOT / "benchmarks" / "results" / "judges.json",
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    base: Annotated[str, typer.Option(help="directory of the base that writes candidates")] = "embedded",
) -> None:
    """Train, measure what has no row yet, and write the result file from all rows."""
    torch.set_num_threads(threads)
    study, judges = parse_settings(words or []), parse_judges(judge or ["2M=embedded"])
    check_settings(work, study, judges, base)
    for seed in range(seeds):
        folder = work / f"seed-{seed}"
        data = draw_data(study, seed, folder, base)
        for size, start in judges.items():
            measure("before", size, start, data, seed, work / "rows")
            checkpoint = folder / size if study.epochs else Path(start)
            if study.epochs and not (checkpoint / TRAINED).exists():
                train_judge(start, checkpoint, study, data, seed)
            measure("judges", size, str(checkpoint), data, seed, work / "rows")
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((work / "rows").glob("*.json"))]
    result = summarise([row for row in rows if row["seed"] < seeds and row["size"] in judges])
    result |= {"command": " ".join(["python benchmarks/judge_study.py", *sys.argv[1:]])}
    result |= {"seeds": seeds, "settings": asdict(study), "checkpoints": judges, "base": base}
    write_json(output, result | {"device": environment() | {"platform": platform.platform()}})
    print(table(result))


def parse_settings(words: Sequence[str]) -> Study:
    """Read NAME=NUMBER. Raises BadParameter, which ends the command."""
    types = {field.name: type(field.default) for field in fields(Study)}
    changes: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            changes[name] = types[name](value)
        except (KeyError, ValueError):
            raise typer.BadParameter(
                f"expected NAME=NUMBER with a name among {', '.join(types)}, found {word!r}"
            ) from None
    return replace(Study(), **changes)


def parse_judges(words: Sequence[str]) -> dict[str, str]:
    """Read SIZE=CHECKPOINT. Raises BadParameter, which ends the command."""
    judges = dict(word.partition("=")[::2] for word in words)
    if len(judges) < len(words) or not all(judges.values()) or not all(judges):
        raise typer.BadParameter(f"--judge: expected SIZE=CHECKPOINT, each size once, found {' '.join(words)}")
    return judges


def check_settings(work: Path, study: Study, judges: Mapping[str, str], base: str) -> None:
    """Write settings into the work folder. Raises BadParameter where it was made with others: they would mix."""
    file = work / "settings.json"
    work.mkdir(parents=True, exist_ok=True)
    wanted = {"study": asdict(study), "base": base}
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else wanted | {"judges": {}}
    changed = [size for size, path in judges.items() if before["judges"].get(size, path) != path]
    if any(before.get(name) != value for name, value in wanted.items()) or changed:
        raise typer.BadParameter(
            f"{file}: expected the same settings and checkpoints, found others. Name another --work"
        )
    write_json(file, wanted | {"judges": {**before["judges"], **judges}})


@dataclass(frozen=True)
class Data:
    """Samples to learn from, for temperatures and to measure on, and the verified candidates of all."""

    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]
    variants: Variants


def draw_data(study: Study, seed: int, folder: Path, base: str) -> Data:
    """Draw a seed's samples, tune the two bases, and generate candidates; existing files of candidates are read."""
    images = folder / "images"
    if study.families:
        return draw_families(study, seed, folder, base)
    train = world_samples("scorer", study.samples + study.tuned, seed, image_dir=images)
    validation = world_samples("validation", study.validation, seed, image_dir=images)
    test = world_samples("test", study.test, seed, image_dir=images)
    recipe = Recipe(
        seed=seed,
        searched_samples=study.samples,
        tuned=((study.tuned, study.tuned_epochs),),
        num_candidates=study.candidates,
    )
    # The judge learns from one model's candidates, and is measured on another's.
    for name in ("learned", "measured"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    learned = tuned_candidates(train, [], recipe, 0, folder / "learned", base)
    others = replace(recipe, searched_samples=0, seed=seed + 1000)
    rationales = world_samples("train", study.tuned, seed, image_dir=images)
    held_out = [*validation, *test]
    measured = tuned_candidates(rationales, held_out, others, 0, folder / "measured", base)
    samples = {sample.id: sample for sample in (*train, *held_out)}
    return Data(train[: study.samples], validation, test, verified_variants(samples, {**learned, **measured}))


def draw_families(study: Study, seed: int, folder: Path, base: str) -> Data:
    """Draw a seed's test samples of all data families, tune one base, and generate candidates for the test samples."""
    recipe = replace(
        Recipe.of_families(),
        seed=seed,
        searched_samples=0,
        tuned=((study.tuned, study.tuned_epochs),),
        num_candidates=study.candidates,
    )
    families, images = list(recipe.families), folder / "images"
    per_family = study.tuned // len(families)
    tuned = [one for name in families for one in read_family(name, per_family, seed, images, "train")]
    test = [one for name in families for one in read_family(name, study.families, seed + FRESH, images, "test")]
    (folder / "measured").mkdir(parents=True, exist_ok=True)
    measured = tuned_candidates(tuned, test, recipe, 0, folder / "measured", base)
    return Data([], [], test, verified_variants({sample.id: sample for sample in test}, measured))


def train_judge(start: str, checkpoint: Path, study: Study, data: Data, seed: int) -> None:
    """Train an R-Scorer over all qualities, fit its temperatures on the validation samples, and write both."""
    by_id = {sample.id: sample for sample in data.train}
    rng = random.Random(f"judge study/{seed}")

    def stated(example: ScorerExample, key: str) -> ScorerExample:
        quality = draw_quality(QUALITIES, f"{seed}/{key}/{example.key}")
        return with_quality(example, by_id[example.key], quality, seed)

    corrupted = scorer_examples(raps_of(data.train), rng, VOCABULARY, variants=study.compared, is_faulty=is_faulty)
    mixed = [with_generated(one, by_id[one.key], data.variants, 2 * study.compared, rng) for one in corrupted]
    trees = [with_generated(one, by_id[one.key], data.variants, study.compared, rng) for one in corrupted]
    for _ in range(study.draws):
        comparable = [sample for sample in data.train if len(data.variants[sample.id]) > 1]
        trees += [
            with_generated(scorer_example(one, ()), one, data.variants, study.compared, rng) for one in comparable
        ]
    recipe = Recipe(seed=seed, learning_rate=study.learning_rate)
    scorer = load_scorer(start)
    if study.checking_epochs:
        shown = [stated(example, "checking") for example in mixed]
        items = checking_items(scorer, by_id, shown, rng, recipe.drills, recipe.claims_per_drill)
        train_items(scorer, items, recipe, study.checking_epochs)
    items = comparing_items(scorer, by_id, [stated(example, f"tree {n}") for n, example in enumerate(trees)])
    train_items(scorer, items, recipe, study.epochs)
    examples = {quality: examples_of(data.validation, data.variants, quality, seed, quality) for quality in QUALITIES}
    calibration = calibrate_confidence(scorer, examples, BUDGET)
    save_text_model(scorer.text_model, checkpoint)
    write_json(checkpoint / CALIBRATION, calibration)
    write_json(checkpoint / TRAINED, {"trees": len(trees), "study": asdict(study)})


def examples_of(
    samples: Iterable[Sample], variants: Variants, quality: ReferenceQuality, seed: int, stated: ReferenceQuality
) -> list[ScorerExample]:
    """Build the examples of samples with at least two candidates: references of a quality, and what its prompt states of them."""
    return [
        replace(
            scorer_example(sample, variants[sample.id]),
            reference=sample_reference(degrade_reference(sample, quality, seed), stated),
        )
        for sample in samples
        if len(variants[sample.id]) > 1
    ]


def measure(kind: str, size: str, checkpoint: str, data: Data, seed: int, folder: Path) -> None:
    """Write the rows of an R-Scorer that are missing.

    A row has, for each test sample with an aligned and an unaligned candidate, `pairs`: [q, u] of each such pair, q the share
    of a win of the aligned one; and for each test sample with two candidates `choices`: whether the best-scored candidate is
    aligned, and the confidence of best against worst. With mode "pairwise" it also has the calibration on the test samples.

    Args:
        kind: "judges", whose prompt states each quality, or "before", whose prompt states "complete".
    """
    for quality in QUALITIES:
        stated: ReferenceQuality = quality if kind == "judges" else "complete"
        files = {mode: folder / f"{seed}-{kind}-{size}-{quality}-{mode}.json" for mode in MODES}
        if all(file.exists() for file in files.values()):
            continue
        scorer = load_scorer(checkpoint, quality=stated)
        shown = [degrade_reference(sample, quality, seed) for sample in data.test]
        candidates = {
            sample.id: [
                Candidate(f"{sample.id}#{n}", sample.id, variant.text, "", "", -1.0)
                for n, variant in enumerate(data.variants[sample.id])
            ]
            for sample in data.test
        }
        for mode, file in files.items():
            scored = score_candidates(scorer, shown, candidates, BUDGET, mode)
            row: dict[str, Any] = {"kind": kind, "size": size, "seed": seed, "quality": quality, "mode": mode}
            row |= outcomes(scored, data.variants)
            if mode == "pairwise":
                examples = examples_of(data.test, data.variants, quality, seed, stated)
                row["calibration"] = calibration_of(scorer, examples)
            write_json(file, row)


def outcomes(scored: Sequence[Mapping[str, Any]], variants: Variants) -> dict[str, Any]:
    """Return `pairs` and `choices` of score rows; see `measure`."""
    pairs, choices = [], []
    for row in scored:
        good = [not variant.faults for variant in variants[row["sample_id"]]]
        wins, confidence, scores = row["win_probability"], row["confidence"], row["scores"]
        of_sample = [
            [round(wins[i][j], 5), round(confidence[i][j], 5)]
            for i, first in enumerate(good) if first
            for j, second in enumerate(good) if not second
        ]  # fmt: skip
        if of_sample:
            pairs.append(of_sample)
        if len(good) > 1:
            best, worst = int(np.argmax(scores)), int(np.argmin(scores))
            choices.append([good[best], round(confidence[best][worst], 5)])
    if not pairs:
        raise typer.BadParameter(
            "expected a test sample with an aligned candidate and another, found none. Raise test, tuned or tuned_epochs, "
            "and name another --work"
        )
    return {"pairs": pairs, "choices": choices}


def calibration_of(scorer: Scorer, examples: Sequence[ScorerExample]) -> dict[str, Any]:
    """Measure the expected calibration error of the likeliest verdicts, without and with the R-Scorer's temperature."""
    logits, targets, _ = pair_logits(scorer, examples, BUDGET)
    right = logits.argmax(-1) == targets
    before, after = (reliability(softmax(logits, t).max(-1), right) for t in (1.0, scorer.temperature))
    return {
        "temperature": scorer.temperature,
        "ece_before": before[0],
        "ece_after": after[0],
        "verdicts_right": float(right.mean()),
        "pairs": len(targets),
        "reliability_before": before[1],
        "reliability_after": after[1],
    }


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute the result's figures from the rows of all seeds."""
    groups: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["seed"], QUALITIES.index(row["quality"]))):
        groups.setdefault((row["kind"], row["size"], row["quality"], row["mode"]), []).append(row)
    result: dict[str, Any] = {"judges": {}, "before": {}, "differences": {}, "coverage": {}, "calibration": {}}
    for (kind, size, quality, mode), of_seeds in groups.items():
        counts = [agreement(row) for row in of_seeds]
        entry = result[kind].setdefault(size, {}).setdefault(quality, {})
        entry[mode] = interval([(agreed, compared) for agreed, compared in counts])
        if kind == "before":
            continue
        result["coverage"].setdefault(size, {}).setdefault(quality, {})[mode] = coverage(of_seeds)
        if mode == "pairwise":
            names = ("temperature", "ece_before", "ece_after", "verdicts_right")
            means = {name: float(np.mean([row["calibration"][name] for row in of_seeds])) for name in names}
            confidences = [np.mean([u for of_sample in row["pairs"] for _, u in of_sample]) for row in of_seeds]
            means["mean_confidence"] = float(np.mean(confidences))  # u of these pairs: it should fall with the quality
            result["calibration"].setdefault(size, {})[quality] = means
            others = [agreement(row) for row in groups[kind, size, quality, "independent"]]
            paired = [(a - b, n) for (a, n), (b, _) in zip(counts, others, strict=True)]
            result["differences"].setdefault(size, {})[quality] = interval(paired)
    return result


def agreement(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return how many pairs of each sample agree with the oracle, and how many there are: [samples] each."""
    agreed = np.array([sum(win > 0.5 for win, _ in of_sample) for of_sample in row["pairs"]], dtype=np.float64)
    return agreed, np.array([len(of_sample) for of_sample in row["pairs"]], dtype=np.float64)


def interval(seeds: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int = 2000) -> list[float]:
    """Return [mean, low, high] of sum(first) / sum(second), the mean over seeds; 95 %, resampled by seed, then by sample."""
    rng = np.random.default_rng(0)
    shares = np.empty((len(seeds), resamples))  # of each seed's resamples
    for number, (hits, counts) in enumerate(seeds):
        picks = rng.integers(0, len(hits), (resamples, len(hits)))
        shares[number] = hits[picks].sum(1) / counts[picks].sum(1)
    drawn = rng.integers(0, len(seeds), (resamples, len(seeds)))
    means = shares[drawn, np.arange(resamples)[:, None]].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return [float(np.mean([hits.sum() / counts.sum() for hits, counts in seeds])), float(low), float(high)]


def coverage(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return by share of the pairs (samples) that is used, the most confident first, how many agree (have an aligned choice)."""
    curve = []
    for share in COVERAGES:
        pairs, choices = [], []
        for row in rows:
            of_pairs = np.array([pair for of_sample in row["pairs"] for pair in of_sample])  # [n, 2]
            of_choices = np.array(row["choices"], dtype=np.float64)  # [n, 2]
            pairs.append(surest(of_pairs[:, 0] > 0.5, of_pairs[:, 1], share))
            choices.append(surest(of_choices[:, 0], of_choices[:, 1], share))
        curve.append({"coverage": share, "pairs": float(np.mean(pairs)), "choices": float(np.mean(choices))})
    return curve


def surest(right: np.ndarray, confidence: np.ndarray, share: float) -> float:
    """Return the mean of `right` [n] over the most confident share of the n, at least one."""
    order = np.argsort(-confidence, kind="stable")[: max(1, round(share * len(confidence)))]
    return float(right[order].mean())


def table(result: Mapping[str, Any]) -> str:
    """Markdown: agreement in percent, pairwise and independent, their difference, and calibration, by size and quality."""
    rows = [
        [
            "R-Scorer",
            "reference",
            "before: pairwise",
            "pairwise",
            "independent",
            "difference",
            "half used",
            "ECE before, after",
        ]
    ]
    for size, qualities in result["judges"].items():
        for quality, of in qualities.items():
            difference, calibration = result["differences"][size][quality], result["calibration"][size][quality]
            half = next(e for e in result["coverage"][size][quality]["pairwise"] if e["coverage"] == 0.5)
            rows.append(
                [
                    size,
                    quality,
                    percent(result["before"][size][quality]["pairwise"]),
                    percent(of["pairwise"]),
                    percent(of["independent"]),
                    percent(difference, "+"),
                    f"{100 * half['pairs']:.1f}",
                    f"{calibration['ece_before']:.3f}, {calibration['ece_after']:.3f}",
                ]
            )
    return markdown(rows)


def percent(value: Sequence[float], sign: str = "") -> str:
    """Write [mean, low, high] in percent."""
    mean, low, high = (format(100 * number, f"{sign}.1f") for number in value)
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    typer.run(main)
