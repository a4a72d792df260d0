"""Summarise a study: accuracy and alignment of each arm, and differences of arms, with intervals over seeds and samples.

An interval is a 95 % percentile bootstrap over two crossed factors: each resample draws seeds with replacement and, in each
evaluation set, samples with replacement; a sample stands for all seeds. A figure is the mean over the evaluation sets, of which
each counts alike however many samples it has. Sets without their own images are controls, which have figures of their own alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from srcfast.config.settings import Config
from srcfast.data.jsonl import read_jsonl
from srcfast.errors import InputError
from srcfast.run.directory import RunDirectory, iteration_of
from srcfast.study.settings import Study

FIGURES = {"accuracy": "right", "alignment": "aligned"}  # and what a prediction calls them
CAPTIONS = (
    "Percent right / percent aligned, each with its 95 % interval over seeds and samples; all sets: those with their own images.",
    "Differences in points, paired by seed and sample.",
)
TRAINING = ("rationale", "dpo")
COUNTED = ("rationale", "candidates", "scores", "preferences", "dpo")  # stages that an arm's cost is the sum of

Outcomes = dict[str, np.ndarray]  # evaluation set -> [seeds, samples], 1 or 0 for a sample that the model got right
Measure = Callable[[np.ndarray], np.ndarray]  # see `interval_of`


@dataclass(frozen=True)
class ArmResults:
    """What an arm's model answered under each seed, and what training it took.

    Attributes:
        outcomes: of each figure; sets that the oracle can't verify have no alignment.
        updates: of all trainings, the mean over seeds.
        seconds, tokens: of the stages that produce the model, each counted as if the arm ran alone; means over seeds.
        samples: of all evaluation sets, controls included.
    """

    outcomes: dict[str, Outcomes]
    updates: float
    seconds: float
    tokens: float
    samples: int


def summarise(study: Study) -> dict[str, Any]:
    """Return the study's summary: arms, differences and judges, each figure as [mean, low, high].

    Raises:
        InputError: an arm isn't finished, or its files are damaged.
    """
    results = {arm: _read_arm(study, arm) for arm in study.settings.arms}
    resamples, seeds = study.settings.resamples, study.settings.seeds
    evaluation = next(iter(study.configs.values())).data.evaluation
    controls = {f"{dataset.name}-{dataset.split}" for dataset in evaluation if dataset.images != "given"}

    def figures(of: Mapping[str, Outcomes]) -> dict[str, Any]:
        whole = {
            figure: interval({name: outcomes[name] for name in outcomes if name not in controls}, resamples)
            for figure, outcomes in of.items()
        }
        sets = {
            name: {
                figure: interval({name: outcomes[name]}, resamples)
                for figure, outcomes in of.items()
                if name in outcomes
            }
            for name in of["accuracy"]
        }
        return whole | {"sets": sets}

    arms = {
        arm: figures(result.outcomes)
        | {
            "seeds": seeds,
            "updates": round(result.updates),
            "samples": result.samples,
            "seconds": result.seconds,
            "tokens": result.tokens,
            "model": study.model(arm),
        }
        for arm, result in results.items()
    }
    differences = {
        f"{first} - {second}": figures(
            {
                figure: {
                    name: outcomes[name] - results[second].outcomes[figure][name]
                    for name in outcomes
                    if name in results[second].outcomes[figure]
                }
                for figure, outcomes in results[first].outcomes.items()
            }
        )
        for first, second in study.pairs
    }
    return {"arms": arms, "differences": differences, "judges": study.judges}


def interval(outcomes: Outcomes, resamples: int) -> list[float] | None:
    """Return [mean, low, high] of the mean over sets; None without a set. All sets share the draws of seeds."""
    if not outcomes:
        return None

    def mean_of(values: np.ndarray) -> Measure:
        return lambda counts: counts @ values.T / values.shape[1]

    seeds = next(iter(outcomes.values())).shape[0]
    return interval_of([(mean_of(values), values.shape[1]) for values in outcomes.values()], seeds, resamples)


def interval_of(measures: Sequence[tuple[Measure, int]], seeds: int, resamples: int) -> list[float]:
    """Return [mean, low, high] of a figure, the mean over seeds and sets.

    Args:
        measures: of each set, the figure as a function of how often each sample is drawn, and the number of samples n: from
            counts [resamples, n] to [resamples, seeds], NaN where there is no figure. Resamples with a NaN are left out.
        seeds: number of seeds.
        resamples: of the bootstrap.
    """
    rng = np.random.default_rng(0)
    of_seeds = _counts(rng, seeds, resamples) / seeds
    means = np.zeros(resamples)
    for measure, n in measures:
        means += (of_seeds * measure(_counts(rng, n, resamples))).sum(axis=1) / len(measures)
    low, high = np.nanquantile(means, [0.025, 0.975])
    once = [measure(np.ones((1, n), dtype=np.int64)).mean() for measure, n in measures]
    return [float(np.mean(once)), float(low), float(high)]


def _counts(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """Draw n of n with replacement; return how often each is drawn, [resamples, n] int64."""
    return rng.multinomial(n, np.full(n, 1 / n), resamples)


def _read_arm(study: Study, arm: str) -> ArmResults:
    """Read what an arm's model answered under each seed."""
    model = study.model(arm)
    by_seed = [read_predictions(study.configs[arm, seed], model) for seed in range(study.settings.seeds)]
    outcomes: dict[str, Outcomes] = {figure: {} for figure in FIGURES}
    for name in by_seed[0]:
        rows = [predictions[name] for predictions in by_seed]
        ids = [[row["id"] for row in of_seed] for of_seed in rows]
        if any(each != ids[0] for each in ids):
            raise InputError(
                file=study.settings.path,
                field=f"evaluation set {name}",
                expected=f"the same samples under each seed of arm {arm}",
                found="others",
                fix="give the evaluation sets a seed that doesn't depend on {seed}",
            )
        for figure, key in FIGURES.items():
            if all(row[key] is not None for of_seed in rows for row in of_seed):
                outcomes[figure][name] = np.array([[float(row[key]) for row in of_seed] for of_seed in rows])
    costs = [_cost(study.configs[arm, seed], model) for seed in range(study.settings.seeds)]
    updates, seconds, tokens = np.mean(costs, axis=0).tolist()
    return ArmResults(outcomes, updates, seconds, tokens, sum(len(rows) for rows in by_seed[0].values()))


def read_predictions(config: Config, model: str) -> dict[str, list[dict[str, Any]]]:
    """Read a run's predictions by evaluation set."""
    directory = RunDirectory(config.run_path)
    predictions = {}
    for entry in directory.manifest().get(f"{model}/evaluation", {}).get("entries", []):
        name = f"{entry['dataset']}-{entry['split']}"
        file = directory.path / "predictions" / model / f"{name}.jsonl"
        predictions[name] = [row for _, row in read_jsonl(file)]
    if not predictions:
        raise InputError(
            file=directory.manifest_file,
            expected=f"a finished evaluation of {model}",
            found="none",
            fix="run the study to its end",
        )
    return predictions


def _cost(config: Config, model: str) -> tuple[int, float, int]:
    """Return updates, seconds and tokens of the stages that produce a run's model."""
    last = -1 if model == "base" else iteration_of(model)
    updates, seconds, tokens = 0, 0.0, 0
    for name, entry in RunDirectory(config.run_path).manifest().items():
        kind = name.rpartition("/")[2]
        if kind in COUNTED and iteration_of(name) <= last:
            seconds += entry["seconds"]
            tokens += entry["tokens"]
            updates += entry["metrics"]["rows"] if kind in TRAINING else 0
    return updates, seconds, tokens


# Tables -----------------------------------------------------------------------------------------------------


def arms_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of a table: each arm's accuracy and alignment, over all sets and on each, and its cost."""
    arms = summary["arms"]
    sets = list(next(iter(arms.values()))["sets"])
    rows = [["arm", "all sets", *sets, "updates", "seconds"]]
    for name, arm in arms.items():
        rows.append(
            [
                name,
                _cell(arm),
                *(_cell(arm["sets"][each]) for each in sets),
                str(arm["updates"]),
                f"{arm['seconds']:.0f}",
            ]
        )
    return rows


def differences_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of a table: each difference of two arms in points, paired by seed and sample."""
    differences = summary["differences"]
    if not differences:
        return []
    sets = list(next(iter(differences.values()))["sets"])
    rows = [["difference", "all sets", *sets]]
    for name, each in differences.items():
        rows.append([name, _cell(each, signed=True), *(_cell(each["sets"][s], signed=True) for s in sets)])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write a table as Markdown; the first row names the columns."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _cell(figures: Mapping[str, Any], signed: bool = False) -> str:
    """Write accuracy and alignment in percent, each with its interval."""
    return " / ".join(percent(figures.get(figure), signed) for figure in FIGURES)


def percent(value: Sequence[float] | None, signed: bool = False) -> str:
    """Write [mean, low, high] in percent, as in `73.1 (71.2 to 75.0)`; a dash for no figure."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    mean, low, high = (format(100 * each, f"{sign}.1f") for each in value)
    return f"{mean} ({low} to {high})"
