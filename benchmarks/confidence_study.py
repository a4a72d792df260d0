"""Does confidence fall as what is seen gets worse? Six confidences, on sound, blurred, covered and noisy pictures.

    python benchmarks/confidence_study.py --seeds 3

arXiv 2605.16999 asks of a vision-language model that its confidence fall with the visual evidence. Here, for each seed, a base
is tuned on rationales and writes candidates for the same questions under pictures of each kind; seeds vary what it is tuned on,
its adapter's start, the order, and the draws. The R-Scorer judges the candidates by references of four qualities, which are
those of the true scene whatever the picture shows, and the candidate of the highest score is chosen. The confidences are

- `u`: the R-Scorer's confidence that the chosen candidate is better than the one of the lowest score;
- `score`: the chosen candidate's score;
- `rating`: the R-Scorer's rating of the chosen candidate alone;
- `likelihood`: the base's mean log-probability of the chosen candidate's tokens, in nats;
- `agreement`: the share of candidates that give the commonest answer;
- `mass`: the share of the candidates' probability that those with the chosen candidate's answer have. The search's candidates are
  distinct texts, so `agreement` counts an unlikely one like a likely one; this does not.

A sample with fewer than two candidates has no pair. Confidences are compared over the others, all over the same ones: their
means, also over those whose chosen candidate is aligned, by the oracle, and over those where it isn't; the area under the
receiver operating characteristic (AUROC) for "the chosen candidate is aligned"; and the area under the risk-coverage curve of
answering the most confident samples alone, to be compared with `risk`, the area where samples are left out at random.
Differences from the first split are paired by seed and sample.

What exists in the work folder is not made again: candidates of a seed and split, and the rows of a seed, split and quality. The
result has {"families": {FAMILY: {SPLIT: {"aligned_candidates": [mean, low, high], ..., "references": {QUALITY: {...}}}}}} with
95 % intervals (bootstrap over seeds and samples, `srcfast.study.results`), and `findings`: the splits on which each confidence
falls (the interval of its difference is below 0), rises, or does neither; `difference_aligned` is the difference where the choice
is aligned under both pictures. The intervals are not corrected for being many.
"""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer

from srcfast.config.datasets import DatasetConfig
from srcfast.data.jsonl import read_jsonl, write_json, write_jsonl
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Candidate, ReferenceQuality, Sample
from srcfast.errors import SrcfastError
from srcfast.models.scorer import load_scorer
from srcfast.recipes.train_scorer import Recipe, search_of, tuned_base
from srcfast.recipes.unfinished import check_recipe
from srcfast.run.environment import environment
from srcfast.run.progress import track
from srcfast.stages.candidates import generate_candidates
from srcfast.stages.datasets import read_dataset
from srcfast.stages.scoring import score_candidates
from srcfast.study.results import Measure, interval_of, markdown
from srcfast.world.degraded_references import degrade_reference
from srcfast.world.samples import DEGRADED
from srcfast.world.verification import can_verify, verify_sample

ROOT = Path(__file__).parents[1]
QUALITIES: tuple[ReferenceQuality, ...] = get_args(ReferenceQuality)
CONFIDENCES = ("u", "score", "rating", "likelihood", "agreement", "mass")
OF_PICTURES = ("aligned_candidates", "candidates", "compared")  # figures that don't depend on the reference
BUDGET = 16_384  # tokens of a forward pass
RESAMPLES = 1000

Columns = dict[str, np.ndarray]  # name of a value -> [seeds, samples], NaN where a sample has none


def main(
    base: Annotated[str, typer.Option(help="directory of the base that is tuned, or embedded")] = "embedded",
    scorer: Annotated[str, typer.Option(help="directory of the R-Scorer, or embedded")] = "embedded",
    family: Annotated[list[str] | None, typer.Option(help="data family; default: world; may be given again")] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="first sound pictures, then others of the same questions; default: world's")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="number of seeds, from 0")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="questions, the same for all seeds and splits")] = 300,
    data_seed: Annotated[int, typer.Option(min=0, help="seed of the questions")] = 77,
    tuned: Annotated[int, typer.Option(min=1, help="rationales that the base is tuned on")] = 150,
    epochs: Annotated[int, typer.Option(min=1, help="how often it sees each")] = 8,
    candidates: Annotated[int, typer.Option(min=2, help="at most, of a sample")] = 5,
    state_quality: Annotated[
        bool, typer.Option(help="tell the R-Scorer each reference's quality: for one that was trained so")
    ] = False,
    work: Annotated[Path, typer.Option(help="folder for what is made on the way")] = Path("runs/confidence"),
    output: Annotated[Path, typer.Option(help="result file")] = ROOT / "benchmarks/results/study/confidence.json",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
) -> None:
    """Generate and judge what has no file yet, and write the result file from all rows."""
    torch.set_num_threads(threads)
    splits, families = split or ["test", *DEGRADED], family or ["world"]
    settings: dict[str, Any] = {
        "base": base,
        "scorer": scorer,
        "samples": samples,
        "data_seed": data_seed,
        "tuned": tuned,
    }
    settings |= {"epochs": epochs, "candidates": candidates, "state_quality": state_quality, "sound": splits[0]}
    recipe = Recipe(num_candidates=candidates, max_new_tokens=112 if base == "embedded" else 176)
    columns: dict[str, dict[str, dict[str, Columns]]] = {}
    try:
        check_recipe(work, settings)
        for name in families:
            shown = draw_pictures(name, splits, samples, data_seed, work / "images")
            rows = []
            for seed in range(seeds):
                folder = work / name / f"seed-{seed}"
                learned = draw(name, "train", tuned, data_seed + 1 + seed, work / "images")
                write_candidates(base, learned, shown, recipe, epochs, seed, folder)
                rows.append(judge(scorer, shown, data_seed, state_quality, folder))
            columns[name] = {s: {q: columns_of([of[s][q] for of in rows]) for q in QUALITIES} for s in splits}
    except SrcfastError as error:
        raise typer.BadParameter(str(error)) from None
    result: dict[str, Any] = {"families": {name: summarise(of) for name, of in columns.items()}}
    result["findings"] = {name: findings(of) for name, of in result["families"].items()}
    command = " ".join(["python benchmarks/confidence_study.py", *sys.argv[1:]])
    result |= {"command": command, "seeds": seeds, "settings": settings}
    write_json(output, result | {"device": environment() | {"platform": platform.platform()}})
    for name in families:
        print(f"\n{name}\n", *tables(result, name).values(), sep="\n\n")


# Pictures and candidates ------------------------------------------------------------------------------------


def draw(family: str, split: str, count: int, seed: int, images: Path) -> list[Sample]:
    """Draw samples of a family. Raises InputError for an unknown split, BadParameter for an unknown family."""
    try:
        dataset = DatasetConfig.model_validate(
            {"name": family, "format": family, "split": split, "limit": count, "seed": seed}
        )
    except ValueError:
        raise typer.BadParameter(
            f"--family: expected world, clips, digits, charts or easy_vqa, found {family}"
        ) from None
    return read_dataset(dataset, images, [])


def draw_pictures(family: str, splits: Sequence[str], count: int, seed: int, images: Path) -> dict[str, list[Sample]]:
    """Return by split the samples of the first split with the pictures of that split.

    Id, question and reference are the first split's, so that draws by id are the same under all pictures.

    Raises:
        BadParameter: the splits don't ask the same questions about the same scenes, or no oracle can verify the answers.
    """
    sound = draw(family, splits[0], count, seed, images)
    shown = {splits[0]: sound}
    if not all(map(can_verify, sound)):
        raise typer.BadParameter(f"--family {family}: expected samples that an oracle can verify, found others")
    for split in splits[1:]:
        others = draw(family, split, count, seed, images)
        asked = [[(s.question, s.answer, s.facts) for s in each] for each in (sound, others)]
        if asked[0] != asked[1]:
            raise typer.BadParameter(f"--split {split}: expected the questions of {splits[0]} again, found others")
        shown[split] = [
            replace(one, images=other.images, image_root=other.image_root)
            for one, other in zip(sound, others, strict=True)
        ]
    return shown


def write_candidates(
    base: str,
    learned: Sequence[Sample],
    shown: Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    epochs: int,
    seed: int,
    folder: Path,
) -> None:
    """Tune the base and write SPLIT.jsonl into the folder where it is missing: candidates, with the oracle's `aligned`."""
    missing = {split: of for split, of in shown.items() if not (folder / f"{split}.jsonl").exists()}
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    pictured = [*learned, *(sample for of in missing.values() for sample in of)]
    model, features = tuned_base(base, learned, pictured, recipe, epochs, seed)
    with track(f"{folder.name}: candidates", sum(map(len, missing.values()))) as progress:
        for split, samples in missing.items():
            features.clear()
            generated = generate_candidates(
                model, samples, search_of(recipe), features=features, seed=seed, batch_size=64, progress=progress
            )
            write_jsonl(
                folder / f"{split}.jsonl",
                [
                    candidate.to_json() | {"aligned": is_aligned(sample, candidate)}
                    for sample, of_sample in zip(samples, generated, strict=True)
                    for candidate in of_sample
                ],
            )


def is_aligned(sample: Sample, candidate: Candidate) -> bool:
    """Return whether the oracle of the true scene finds a candidate right throughout."""
    verification = verify_sample(sample, parse_response(candidate.text))
    return verification is not None and verification.aligned


def judge(
    scorer: str, shown: Mapping[str, Sequence[Sample]], seed: int, state_quality: bool, folder: Path
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Judge a seed's candidates where there are no rows yet, by references of each quality; return rows by split and quality."""
    files = {(split, quality): folder / f"{split}-{quality}.json" for quality in QUALITIES for split in shown}
    missing = [key for key, file in files.items() if not file.exists()]
    judges, candidates = {}, {split: read_candidates(folder / f"{split}.jsonl", shown[split]) for split, _ in missing}
    with track(f"{folder.name}: judging", sum(len(shown[split]) for split, _ in missing)) as progress:
        for split, quality in missing:
            stated: ReferenceQuality = quality if state_quality else "complete"
            if stated not in judges:
                judges[stated] = load_scorer(scorer, quality=stated)
            judged = [degrade_reference(sample, quality, seed) for sample in shown[split]]
            scored = score_candidates(judges[stated], judged, candidates[split], BUDGET)
            scores = {row["sample_id"]: row for row in scored}
            write_json(files[split, quality], [outcome(of, scores.get(key)) for key, of in candidates[split].items()])
            progress.advance(len(judged))
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {split: {} for split in shown}
    for (split, quality), file in files.items():
        rows[split][quality] = json.loads(file.read_text(encoding="utf-8"))
    return rows


def read_candidates(file: Path, samples: Sequence[Sample]) -> dict[str, list[Candidate]]:
    """Read a file's candidates by sample id, in the samples' order."""
    candidates: dict[str, list[Candidate]] = {sample.id: [] for sample in samples}
    for line, row in read_jsonl(file):
        candidate = Candidate.from_json(row, file=file, line=line)
        candidates[candidate.sample_id].append(candidate)
    return candidates


def outcome(candidates: Sequence[Candidate], scored: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what is measured of a sample.

    Args:
        candidates: with `aligned` in `extra`.
        scored: the sample's row of `score_candidates`; None: it has no candidates.

    Returns:
        The number of `candidates`; `aligned_candidates`, the share of them that is aligned; whether the chosen one is `aligned`;
        and with two candidates or more each of CONFIDENCES.
    """
    if scored is None:
        return {"candidates": 0, "aligned_candidates": 0.0, "aligned": False}
    aligned = [bool(candidate.extra["aligned"]) for candidate in candidates]
    best, worst = int(np.argmax(scored["scores"])), int(np.argmin(scored["scores"]))
    chosen = candidates[best]
    row = {"candidates": len(candidates), "aligned_candidates": sum(aligned) / len(aligned), "aligned": aligned[best]}
    if len(candidates) < 2:
        return row
    answers = [candidate.answer.strip().lower() for candidate in candidates]
    shares = np.exp([candidate.logprob for candidate in candidates])
    same = np.array([answer == answers[best] for answer in answers])
    return row | {
        "u": scored["confidence"][best][worst],
        "score": scored["scores"][best],
        "rating": scored["alone"][best],
        "likelihood": chosen.logprob / len(chosen.token_ids),
        "agreement": max(Counter(answers).values()) / len(candidates),
        "mass": float(shares[same].sum() / shares.sum()),
    }


# Figures ----------------------------------------------------------------------------------------------------


def columns_of(rows: Sequence[Sequence[Mapping[str, Any]]]) -> Columns:
    """Turn the rows of each seed into columns; `compared` tells whether a sample has a pair, `risk` whether it errs if it has."""
    names = ("candidates", "aligned_candidates", "aligned", *CONFIDENCES)
    columns = {name: np.array([[float(row.get(name, "nan")) for row in of] for of in rows]) for name in names}
    pairs = columns["candidates"] > 1
    return columns | {"compared": pairs.astype(float), "risk": np.where(pairs, 1.0 - columns["aligned"], np.nan)}


def auroc(counts: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the share of (right, wrong) pairs of which the right one is more confident; of a tie half. NaN without a pair.

    Args:
        counts: [R, n] how often each of n occurs.
        confidence, right: [n], right 0 or 1.

    Returns:
        [R].
    """
    positive, negative = _by_confidence(counts, confidence, right), _by_confidence(counts, confidence, 1 - right)
    below = negative.cumsum(axis=1) - negative
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    won = (positive * (below + negative / 2)).sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)


def risk_coverage_area(counts: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the mean over k of the share of errors among the k most confident: [R]; NaN of none. Arguments as of `auroc`.

    Those of equal confidence come in random order, and the area is its expectation. If m follow a others with E errors, and
    have a share r of errors, it is the sum over k from a + 1 to a + m of (E + (k - a) r) / k, so harmonic numbers tell it.
    """
    members = _by_confidence(counts, -confidence, np.ones_like(right))  # [R, groups], the most confident first
    errors = _by_confidence(counts, -confidence, 1 - right)
    before, errors_before = members.cumsum(axis=1) - members, errors.cumsum(axis=1) - errors
    share = np.divide(errors, members, out=np.zeros(errors.shape), where=members > 0)
    total = members.sum(axis=1)
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, int(total.max(initial=0)) + 1))])
    steps = harmonic[(before + members).astype(int)] - harmonic[before.astype(int)]
    area = ((errors_before - before * share) * steps + errors).sum(axis=1)
    return np.divide(area, total, out=np.full(len(counts), np.nan), where=total > 0)


def _by_confidence(counts: np.ndarray, confidence: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Sum counts times weight [n] over those of equal confidence: [R, groups], the least confident first."""
    order = np.argsort(confidence, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(confidence[order]) != 0]))
    return np.add.reduceat(counts[:, order] * weight[order].astype(np.float64), starts, axis=1)


def mean_of(values: np.ndarray) -> list[float] | None:
    """Return [mean, low, high] of values [seeds, samples] over those that there are; None where a seed has none."""

    def measure(counts: np.ndarray) -> np.ndarray:
        total = counts @ (~np.isnan(values)).T.astype(float)  # [R, seeds]
        return np.divide(counts @ np.nan_to_num(values).T, total, out=np.full(total.shape, np.nan), where=total > 0)

    return _interval(measure, values)


def area_of(area: Any, confidence: np.ndarray, right: np.ndarray) -> list[float] | None:
    """Return [mean, low, high] of `auroc` or `risk_coverage_area` over the samples that have the confidence: [seeds, samples]."""
    there = ~np.isnan(confidence)

    def measure(counts: np.ndarray) -> np.ndarray:
        return np.stack(
            [
                area(counts[:, has], of[has], true[has]) if has.any() else np.full(len(counts), np.nan)
                for has, of, true in zip(there, confidence, right, strict=True)
            ],
            axis=1,
        )

    return _interval(measure, confidence)


def _interval(measure: Measure, values: np.ndarray) -> list[float] | None:
    seeds, n = values.shape
    if np.isnan(measure(np.ones((1, n), dtype=np.int64))).any():
        return None
    return [round(each, 5) for each in interval_of([(measure, n)], seeds, RESAMPLES)]


def summarise(family: Mapping[str, Mapping[str, Columns]]) -> dict[str, Any]:
    """Compute a family's figures from its columns by split and quality; the first split is that of sound pictures."""
    result: dict[str, Any] = {}
    with track("figures", len(family) * len(QUALITIES), "qualities") as progress:
        for split, of_split in family.items():
            first = next(iter(of_split.values()))
            entry: dict[str, Any] = {name: mean_of(first[name]) for name in OF_PICTURES}
            entry["references"] = {}
            for quality, columns in of_split.items():
                sound = next(iter(family.values()))[quality]
                both = (columns["aligned"] == 1) & (sound["aligned"] == 1)
                entry["references"][quality] = {
                    "aligned": mean_of(columns["aligned"]),
                    "risk": mean_of(columns["risk"]),
                    "aligned_difference": mean_of(columns["aligned"] - sound["aligned"]),
                    "confidences": {
                        name: {
                            "mean": mean_of(columns[name]),
                            "mean_aligned": mean_of(np.where(columns["aligned"] == 1, columns[name], np.nan)),
                            "mean_others": mean_of(np.where(columns["aligned"] == 0, columns[name], np.nan)),
                            "difference": mean_of(columns[name] - sound[name]),
                            "difference_aligned": mean_of(np.where(both, columns[name] - sound[name], np.nan)),
                            "auroc": area_of(auroc, columns[name], columns["aligned"]),
                            "risk_coverage": area_of(risk_coverage_area, columns[name], columns["aligned"]),
                        }
                        for name in CONFIDENCES
                    },
                }
                progress.advance()
            result[split] = entry
    return result


def findings(family: Mapping[str, Any]) -> dict[str, Any]:
    """Return {QUALITY: {CONFIDENCE: {"falls": splits, "rises": splits, "neither": splits}}} of all splits but the first."""
    moves: dict[str, Any] = {
        q: {name: {"falls": [], "rises": [], "neither": []} for name in CONFIDENCES} for q in QUALITIES
    }
    for split in list(family)[1:]:
        for quality, entry in family[split]["references"].items():
            for name, figures in entry["confidences"].items():
                moves[quality][name][direction(figures["difference"])].append(split)
    return moves


def direction(difference: Sequence[float] | None) -> str:
    """Return whether an interval [mean, low, high] falls, rises, or does neither."""
    if difference is None or difference[1] <= 0.0 <= difference[2]:
        return "neither"
    return "falls" if difference[2] < 0.0 else "rises"


# Tables -----------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any], family: str) -> dict[str, str]:
    """Write a family's figures as Markdown: `findings` by quality; with complete references all else.

    Returns:
        `means` and their differences; `aligned`, the differences where the choice is aligned under both pictures; `auroc`; and
        `risk_coverage`.
    """
    splits = result["families"][family]
    complete = {split: entry["references"]["complete"] for split, entry in splits.items()}
    means = [["pictures", "candidates aligned, %", "chosen aligned, %", *CONFIDENCES]]
    separation = [["pictures", *CONFIDENCES]]
    risks = [["pictures", "risk", *CONFIDENCES]]
    for split, of in complete.items():
        confidences = of["confidences"]
        shares = [f"{100 * each[0]:.1f}" for each in (splits[split]["aligned_candidates"], of["aligned"])]
        means.append([split, *shares, *(_moved(confidences[name]) for name in CONFIDENCES)])
        separation.append([split, *(_with_ends(confidences[name]["auroc"]) for name in CONFIDENCES)])
        risks.append([split, _number(of["risk"]), *(_number(confidences[n]["risk_coverage"]) for n in CONFIDENCES)])
    counts = [["reference", *CONFIDENCES]]
    for quality, of_quality in result["findings"][family].items():
        cells = [" / ".join(str(len(splits)) for splits in of_quality[name].values()) for name in CONFIDENCES]
        counts.append([quality, *cells])
    aligned = [["pictures", *CONFIDENCES]]
    for split in list(splits)[1:]:
        differences = [complete[split]["confidences"][name]["difference_aligned"] for name in CONFIDENCES]
        aligned.append([split, *(_with_ends(difference, "+") for difference in differences)])
    named = {"means": means, "findings": counts, "aligned": aligned, "auroc": separation, "risk_coverage": risks}
    return {name: markdown(rows) for name, rows in named.items()}


def _moved(figures: Mapping[str, Any]) -> str:
    """Write a mean, and in brackets its difference from that of sound pictures; bold if it falls or rises."""
    difference = figures["difference"]
    if difference is None or not any(difference):
        return _number(figures["mean"])
    moved = f"{difference[0]:+.2f}"
    return f"{_number(figures['mean'])} ({moved if direction(difference) == 'neither' else f'**{moved}**'})"


def _number(value: Sequence[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.2f}"


def _with_ends(value: Sequence[float] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    mean, low, high = (format(each, f"{sign}.2f") for each in value)
    return f"{mean} ({low} to {high})"


if __name__ == "__main__":
    typer.run(main)
