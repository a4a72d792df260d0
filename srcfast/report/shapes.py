"""Shapes of the files that the page reads, so that a malformed file is an error that names it, not a crash in a template."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError, model_validator

from srcfast.errors import InputError

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Number = Annotated[float, Field(gt=-1e15, lt=1e15, allow_inf_nan=False)]
Measure = Number | None
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)] | None
Seconds = Annotated[float, Field(ge=0, lt=1e10)]
Claim = Annotated[tuple[str, Any, Any], Strict(False)]  # sentence, kind, verdict; JSON has lists for tuples


class Shape(BaseModel):
    """A JSON object whose named keys have these types; other keys may have any value."""

    model_config = ConfigDict(extra="allow", strict=True)


class Cases(Shape):
    """Counts of the four cases."""

    both_right: Count
    right_answer_wrong_rationale: Count
    right_rationale_wrong_answer: Count
    both_wrong: Count


class Ability(Shape):
    """Measures of one ability."""

    n: Count = 0
    accuracy: Measure = None
    alignment: Measure = None


class Category(Shape):
    """Measures of one category."""

    n: Count
    accuracy: Number
    accuracy_ci95: Interval = None
    scores: dict[str, Number] = {}


class Judge(Shape):
    """Who scored free answers, and by which prompt."""

    model: str
    prompt_sha256: str


class Evaluation(Shape):
    """An evaluation in `summary.json`: one model on one dataset."""

    model: str
    dataset: str
    split: str
    n: Count
    accuracy: Number
    accuracy_ci95: Interval = None
    alignment: Measure = None
    alignment_ci95: Interval = None
    rationale_accuracy: Measure = None
    rationale_accuracy_ci95: Interval = None
    right_answer_wrong_rationale: Measure = None
    unparsed: Count = 0
    rule: str = ""
    scores: dict[str, Number] = {}
    cases: Cases | None = None
    by_ability: dict[str, Ability] = {}
    by_category: dict[str, dict[str, Category]] = {}
    judge: Judge | None = None


class Histogram(Shape):
    """Counts [n] between edges [n + 1]."""

    counts: list[Annotated[float, Field(ge=0, lt=1e15)]]
    edges: list[Number]

    @model_validator(mode="after")
    def _check_edges(self) -> Histogram:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.edges)} edges for {len(self.counts)} counts")
        return self


class Funnel(Shape):
    """Counts and measures of one round of curation."""

    samples: Count = 0
    with_two_parsed_distinct: Count = 0
    with_pair: Count = 0
    pairs_proposed: Count = 0
    within_margin: Count = 0
    within_confidence: Count = 0
    kept: Count = 0
    left_out_negatives: Count = 0
    rationale_pairs: Count = 0
    dropped: dict[str, Count] = {}
    pair_correctness: dict[str, Measure] = {}
    order_flip_rate: Measure = None
    order_shift: Measure = None
    tie_rate: Measure = None
    mean_confidence: Measure = None
    mean_kept_confidence: Measure = None
    length_correlation: Measure = None
    candidate_tokens: Count | None = None
    comparisons: Count | None = None
    score_histogram: Histogram | None = None
    confidence_histogram: Histogram | None = None


class Headroom(Shape):
    """Headroom of one round on one dataset."""

    iteration: Count | str
    dataset: str
    split: str
    n: Count
    n_candidates: Number
    pass_at_1: Number
    best_of_n: Number
    pass_at_n: Number
    next_pass_at_1: Measure = None
    recovered: Measure = None
    scorer_oracle_agreement: Measure = None


class Stage(Shape):
    """Time and throughput of one stage."""

    name: str
    seconds: Seconds
    tokens_per_second: Measure = None


class FinishedStage(Shape):
    """An entry of `manifest.json`, of which a summary is made."""

    seconds: Seconds
    tokens: Count
    peak_rss_bytes: Count
    entries: list[dict[str, Any]] = []


class Progress(Shape):
    """`progress.json`: how much of a stage is done."""

    stage: str
    done: Count
    total: Count
    unit: str
    tokens: Count
    seconds: Seconds
    written: Seconds


class Summary(Shape):
    """`summary.json`."""

    evaluations: list[Evaluation] = []
    headroom: list[Headroom] = []
    funnel: dict[str, Funnel] = {}
    diversity: dict[str, dict[str, Measure]] = {}
    adaptive: dict[str, dict[str, Measure]] = {}
    calibration: dict[str, dict[str, Measure]] = {}
    rejected: Count | None = None
    stages: list[Stage] = []
    peak_rss_bytes: Count | None = None
    seconds: Seconds = 0.0


class Candidate(Shape):
    """A candidate in `gallery.json`."""

    text: str
    score: Number
    case: str | None = None
    claims: list[Claim] | None = None


class Image(Shape):
    """Names of an image in `gallery.json`."""

    image: str | None = None
    image_from_run: str = ""


class Card(Image):
    """An entry of `gallery.json`, with the names of its first image."""

    sample_id: str
    question: str
    gold: str
    candidates: list[Candidate]
    further_images: list[Image] = []
    iteration: Any = None
    chosen: Count | None = None
    rejected: Count | None = None
    confidence: Measure = None


class Step(Shape):
    """A row of `metrics.jsonl`."""

    stage: str = ""
    step: Count = 0
    loss: Measure = None
    margin: Measure = None
    reward_accuracy: Measure = None
    chosen_reward: Measure = None
    rejected_reward: Measure = None
    learning_rate: Measure = None


class EvaluationSettings(Shape):
    """The evaluation's settings that the page shows."""

    max_new_tokens: Count | None = None
    bootstrap_resamples: Count | None = None


class Settings(Shape):
    """The settings in `config.yaml` that the page shows."""

    iterations: Annotated[int, Field(ge=0, le=100)] = 1
    model: dict[str, Any] = {}
    candidates: dict[str, Any] = {}
    evaluation: EvaluationSettings = EvaluationSettings()


def check_shape(value: Any, shape: Any, file: Path, line: int | None = None) -> None:
    """Check a value read from a file.

    Raises:
        InputError: the value has another shape; the error names file, line and field.
    """
    try:
        TypeAdapter(shape).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        actual = "nothing" if first["type"] == "missing" else repr(first["input"])
        raise InputError(
            file=file,
            line=line,
            field=".".join(str(part) for part in first["loc"]) or None,
            expected=f"what a run writes ({first['msg']})",
            found=actual,
            fix="put the file back as it was, or run the same command of the run again",
        ) from error
