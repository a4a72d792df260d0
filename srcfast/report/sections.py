"""Collect what the page's sections show, as plain data; the templates have the words and the markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from srcfast.data.answer_rules import rule_text
from srcfast.report.run_files import RunFiles

SAMPLE_STEPS = {
    "samples": "samples",
    "with_two_parsed_distinct": "with two candidates that parse and differ",
    "with_pair": "with a pair to propose",
}
PAIR_STEPS = {
    "pairs_proposed": "pairs proposed",
    "within_margin": "within the score margin",
    "within_confidence": "within the confidence bound",
    "kept": "selected for DPO",
    "left_out_negatives": "added: a sentence left out",
    "rationale_pairs": "added: the same answer after either rationale",
}
RATES = {
    "order_flip_rate": "verdicts that flip with the order",
    "order_shift": "mean advantage of the candidate that is shown first",
    "tie_rate": "ties",
    "mean_confidence": "mean confidence of comparisons",
    "mean_kept_confidence": "mean confidence of selected pairs",
    "length_correlation": "correlation of score and length",
    "candidate_tokens": "tokens of the candidates",
    "comparisons": "comparisons by the R-Scorer",
}
RATE_FORMATS = {
    "mean_confidence": ".2f",
    "mean_kept_confidence": ".2f",
    "length_correlation": "+.2f",
    "order_shift": "+.3f",
    "candidate_tokens": ",",
    "comparisons": ",",
}
ADAPTIVE = {
    "pairs_share": "share of all comparisons that were run",
    "tokens_share": "share of all comparisons' tokens that were run",
    "widened": "samples in which more contenders were compared",
    "same_best": "audited samples with the best candidate that all comparisons give",
    "same_worst": "audited samples with the worst candidate that all comparisons give",
    "same_pair": "audited samples with both",
}
CALIBRATION = {
    "ece_before": "expected calibration error of held-out verdicts before the R-Scorer was calibrated",
    "ece_after": "expected calibration error of held-out verdicts since",
}
DIVERSITY = {
    "distinct_texts": "distinct texts among a sample's candidates",
    "distinct_answers": "distinct answers among a sample's candidates",
    "bigram_overlap": "token bigrams that two candidates share",
}
MEASURES = {"accuracy": "answers right", "alignment": "answers right for a right reason"}
MEANS = ("loss", "margin", "reward_accuracy", "chosen_reward", "rejected_reward")


@dataclass(frozen=True)
class Split:
    """A split of a dataset, with its evaluations in the order of the models."""

    dataset: str
    name: str
    evaluations: list[dict[str, Any]]
    base: dict[str, Any] | None  # evaluation of the base model

    @property
    def rule(self) -> str:
        """Which answers are right, unless it is those that are equal."""
        return rule_text(self.evaluations[0]) if self.evaluations else ""

    @property
    def has_cases(self) -> bool:
        """Whether an evaluation has counts of the four cases."""
        return any(row.get("cases") for row in self.evaluations)


@dataclass(frozen=True)
class Headline:
    """The measures on the first split, from the first model to the last."""

    dataset: str
    split: str
    first: str
    last: str
    measures: list[tuple[str, float, float]]  # label, before, after
    pairs: int  # preference pairs trained on, over all iterations


@dataclass(frozen=True)
class AbilityTable:
    """The measures on a split by ability; the values of a row run over measures, then models."""

    dataset: str
    split: str
    models: list[str]
    measures: list[str]
    rows: list[tuple[str, int, list[float | None]]]  # ability, samples, values


@dataclass(frozen=True)
class CategoryTable:
    """The measures on a split by the values of a column, of each model in the order of `models`."""

    dataset: str
    split: str
    column: str
    models: list[str]
    scores: list[str]  # names of what the rule reports beside accuracy; chance, which all models share, apart
    has_chance: bool
    rows: list[tuple[str, int, float | None, list[dict[str, Any]]]]  # value, samples, chance, entries

    @property
    def measures(self) -> list[str]:
        """The headings of accuracy and the scores."""
        return [f"{words(name)}, %" for name in ("accuracy", *self.scores)]


@dataclass(frozen=True)
class TrainingStage:
    """End of a training stage: means over the last tenth of its steps, of the measures that the stage has."""

    name: str
    steps: int
    means: dict[str, float]
    peak_learning_rate: float


@dataclass(frozen=True)
class State:
    """How far a run is that is not done.

    Attributes:
        finished: names of the finished stages.
        current: name of the stage that is under way or was stopped, empty where none is.
        amount: of it, such as `12 of 40 steps`; empty if it is not known.
        share: of it that is done, from 0 to 1.
        seconds_left: of it, by its speed so far; None if it is not known.
        written: when its progress was recorded, in seconds since 1970; 0: never.
        to_come: names of the stages after it.
    """

    finished: list[str]
    current: str
    amount: str
    share: float
    seconds_left: float | None
    written: float
    to_come: list[str]


@dataclass(frozen=True)
class Bar:
    """A horizontal bar with a label before it and a text behind it."""

    label: str
    percent: float  # length, of the longest bar's
    text: str


@dataclass(frozen=True)
class Funnel:
    """Counts from samples to selected pairs, and why pairs were dropped."""

    name: str
    samples: list[Bar]
    pairs: list[Bar]
    dropped: dict[str, int]


def percent(value: float | None) -> str:
    """Format a share in percent: 0.7134 -> 71.3; None -> –."""
    return "–" if value is None else f"{100 * value:.1f}"


def duration(seconds: float) -> str:
    """Format seconds as 4.2 s, or as 0:12:05."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def words(name: str) -> str:
    """Turn a name into words: two_words -> two words."""
    return name.replace("_", " ")


def moment(seconds: float) -> str:
    """Format seconds since 1970 as 2026-01-31 12:05:00 UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def state(run: RunFiles) -> State | None:
    """Collect how far a run is; None for one that is done."""
    if not run.remaining:
        return None
    progress = run.progress
    if progress is None:
        return State(run.finished, "", "", 0.0, None, 0.0, run.remaining)
    done, total = progress["done"], progress["total"]
    return State(
        run.finished,
        current=progress["stage"],
        amount=f"{done:,} of {total:,} {progress['unit']}",
        share=min(1.0, done / max(1, total)),
        seconds_left=max(0, total - done) * progress["seconds"] / done if done else None,
        written=progress["written"],
        to_come=[name for name in run.remaining if name != progress["stage"]],
    )


def headline(run: RunFiles) -> Headline | None:
    """Collect the page's tiles; None for a run without evaluations."""
    if not run.evaluations:
        return None
    dataset, split = run.splits[0]
    first, last = run.models[0], run.models[-1]
    before, after = (run.evaluation(model, dataset, split) or {} for model in (first, last))
    measures = [(label, before.get(key), after.get(key)) for key, label in MEASURES.items()]
    return Headline(
        dataset,
        split,
        first,
        last,
        measures=[(label, old, new) for label, old, new in measures if old is not None and new is not None],
        pairs=sum(
            funnel.get(name, 0)
            for funnel in run.summary.get("funnel", {}).values()
            for name in ("kept", "left_out_negatives", "rationale_pairs")
        ),
    )


def splits(run: RunFiles) -> list[Split]:
    """Group the evaluations by split."""
    return [
        Split(
            dataset,
            split,
            [row for model in run.models if (row := run.evaluation(model, dataset, split)) is not None],
            run.evaluation("base", dataset, split),
        )
        for dataset, split in run.splits
    ]


def abilities(run: RunFiles) -> list[AbilityTable]:
    """Collect accuracy and alignment by ability, for splits with more than one ability that is no category of `categories`."""
    tables = []
    for split in splits(run):
        if any("category" in row.get("by_category", {}) for row in split.evaluations):
            continue
        groups = {row["model"]: row["by_ability"] for row in split.evaluations if row.get("by_ability")}
        names = sorted({name for group in groups.values() for name in group})
        if len(names) < 2:
            continue
        measures = {"accuracy": "accuracy, %", "alignment": "aligned, %"}
        if all(ability.get("alignment") is None for group in groups.values() for ability in group.values()):
            del measures["alignment"]
        rows = []
        for name in names:
            of_models = [group.get(name, {}) for group in groups.values()]
            count = max(ability.get("n", 0) for ability in of_models)
            rows.append((name, count, [ability.get(key) for key in measures for ability in of_models]))
        tables.append(AbilityTable(split.dataset, split.name, list(groups), list(measures.values()), rows))
    return tables


def categories(run: RunFiles) -> list[CategoryTable]:
    """Collect accuracy and the rule's scores by the columns that an evaluation set has categories in."""
    tables = []
    for split in splits(run):
        columns = dict.fromkeys(column for row in split.evaluations for column in row.get("by_category", {}))
        for column in columns:
            groups = {row["model"]: row.get("by_category", {}).get(column, {}) for row in split.evaluations}
            values = dict.fromkeys(value for group in groups.values() for value in group)
            entries = [entry for group in groups.values() for entry in group.values()]
            names = dict.fromkeys(name for entry in entries for name in entry.get("scores", {}))
            rows = []
            for value in values:
                of_models = [group.get(value, {}) for group in groups.values()]
                chances = [entry["scores"]["chance"] for entry in of_models if "chance" in entry.get("scores", {})]
                n = max(entry.get("n", 0) for entry in of_models)
                rows.append((value, n, chances[0] if chances else None, of_models))
            scores = [name for name in names if name != "chance"]
            tables.append(
                CategoryTable(split.dataset, split.name, column, list(groups), scores, "chance" in names, rows)
            )
    return tables


def training(run: RunFiles) -> list[TrainingStage]:
    """Summarise the end of each training stage."""
    stages = []
    for name in run.training_stages:
        steps = run.training(name)
        tail = steps[-max(1, len(steps) // 10) :]
        measured = {key: [step[key] for step in tail if step.get(key) is not None] for key in MEANS}
        means = {key: sum(values) / len(values) for key, values in measured.items() if values}
        peak = max(step.get("learning_rate") or 0.0 for step in steps)
        stages.append(TrainingStage(name, len(steps), means, peak))
    return stages


def bars(rows: Sequence[tuple[str, float, str]]) -> list[Bar]:
    """Turn rows of label, value and text into bars, scaled to the largest value."""
    longest = max((value for _, value, _ in rows), default=0.0) or 1.0
    return [Bar(label, 100 * value / longest, text) for label, value, text in rows]


def funnels(run: RunFiles) -> list[Funnel]:
    """Collect each iteration's counts from samples to selected pairs."""

    def steps(counts: Mapping[str, int], labels: Mapping[str, str]) -> list[Bar]:
        return bars([(label, counts[key], f"{counts[key]:,}") for key, label in labels.items() if key in counts])

    return [
        Funnel(
            name,
            steps(counts, SAMPLE_STEPS),
            steps(counts, PAIR_STEPS),
            {words(reason): count for reason, count in counts.get("dropped", {}).items() if count},
        )
        for name, counts in run.summary.get("funnel", {}).items()
    ]


def rates(run: RunFiles) -> list[tuple[str, list[str]]]:
    """Collect measures of the R-Scorer's reliability and the candidates' diversity: a label, and a value for each funnel."""
    by_funnel = run.summary.get("funnel", {})
    correctness = {name: counts.get("pair_correctness", {}) for name, counts in by_funnel.items()}
    kinds = {kind: f"selected pairs with answers {words(kind)}" for counts in correctness.values() for kind in counts}

    def rows(labels: Mapping[str, str], values: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
        return [
            (label, [f"{percent(values.get(name, {}).get(key))} %" for name in by_funnel])
            for key, label in labels.items()
            if any(key in measured for measured in values.values())
        ]

    scorer = [
        (label, [_rate(key, counts.get(key)) for counts in by_funnel.values()])
        for key, label in RATES.items()
        if any(key in counts for counts in by_funnel.values())
    ]
    of_stages = (("calibration", CALIBRATION), ("adaptive", ADAPTIVE), ("diversity", DIVERSITY))
    more = [rows(labels, run.summary.get(key, {})) for key, labels in of_stages]
    return scorer + rows(kinds, correctness) + [row for each in more for row in each]


def _rate(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    # Shares are shown in percent; confidences, correlations and counts are not.
    return format(value, RATE_FORMATS[key]) if key in RATE_FORMATS else f"{percent(value)} %"


def timings(run: RunFiles) -> list[Bar]:
    """Collect wall-clock time and throughput of each stage."""
    rows = []
    for stage in run.summary.get("stages", []):
        speed = stage.get("tokens_per_second")
        text = duration(stage["seconds"]) + (f", {speed:,.0f} tokens/s" if speed else "")
        rows.append((stage["name"], stage["seconds"], text))
    return bars(rows)
