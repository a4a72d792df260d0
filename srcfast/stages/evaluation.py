"""Evaluation: answer greedily, parse as training data is parsed, compare with the gold answer and, in the world, ask the oracle.

`answers_in_chunks` runs the model; `write_evaluation` reads its rows, writes predictions and returns the summary's entry.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from srcfast.config.settings import Config, EvaluationConfig
from srcfast.data.answer_rules import CATEGORY_COLUMNS, JudgeScores, Rule, RuleScores, categories_of, is_right_by
from srcfast.data.convert import prediction_columns, write_predictions_tsv
from srcfast.data.gc_pauses import pause_full_collections
from srcfast.data.jsonl import read_jsonl, write_jsonl
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Sample
from srcfast.generation.buffers import DecodingMemory
from srcfast.generation.generate import Features, generate_greedy
from srcfast.models.lora import folded_lora
from srcfast.models.lvlm import ImageFeatures
from srcfast.models.protocols import VisionLanguageModel
from srcfast.models.sharding import in_step_with
from srcfast.run.chunks import BATCHES, ChunkFiles, ChunkResult, Chunks, run_chunks
from srcfast.stages.candidates import Progress, decoding_memory, prompts_of
from srcfast.stages.datasets import EvaluationSet
from srcfast.stages.free_answers import free_answer, judge_answers, prompt_hash
from srcfast.world.verification import CASES, Verification, verify_sample

MOST_CATEGORIES = 256  # values of a column; one with more names samples, not categories
_ENDS = [0.025, 0.975]  # of an interval, as quantiles


@dataclass(frozen=True)
class Prediction:
    """One sample's greedy response, parsed and verified."""

    sample: Sample
    text: str
    rationale: str
    answer: str | None  # None: the response did not parse
    right: bool
    judgement: Verification | None  # None: the sample carries no scene to check a rationale against
    judged: JudgeScores | str | None = None  # of a free answer: the judge's scores, or why there are none

    @property
    def scores(self) -> JudgeScores | None:
        """The judge's scores, if there are some."""
        return self.judged if isinstance(self.judged, JudgeScores) else None

    def to_json(self) -> dict[str, Any]:
        """Return the row of `predictions`: `prediction` is the bare answer, as VLMEvalKit scores it."""
        scores = asdict(self.judged) if isinstance(self.judged, JudgeScores) else {"unscored": self.judged}
        return ({} if self.judged is None else {"judged": scores}) | {
            "id": self.sample.id,
            "question": self.sample.question,
            "answer": self.sample.answer,
            "prediction": self.answer or "",
            "rationale": self.rationale,
            "text": self.text,
            "right": self.right,
            "case": None if self.judgement is None else self.judgement.case,
            "aligned": None if self.judgement is None else self.judgement.aligned,
            "ability": self.sample.extra.get("ability"),
        }


def answer_greedily(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    features: Features,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
    graphs: bool = True,
    memory: DecodingMemory | None = None,
) -> list[Prediction]:
    """Answer every sample greedily with an LVLM; parse and verify the responses.

    Args:
        model: an LVLM.
        samples: the questions to answer.
        features: image keys to embeddings.
        max_new_tokens: of a response.
        batch_size: samples at once; as one ends, the next takes its slot.
        progress: advances by samples done and tokens run.
        graphs: on a GPU, replay steps as CUDA graphs.
        memory: a `decoding_memory` of the stage; default: one for this call.
    """
    on_batch = None if progress is None else progress.advance
    with folded_lora(model):
        prompts = prompts_of(model, samples)
        generated = generate_greedy(model, prompts, features, max_new_tokens, batch_size, on_batch, graphs, memory)
    with pause_full_collections():
        return [predict(s, model.decode(response.token_ids)) for s, response in zip(samples, generated, strict=True)]


def write_predictions(
    path: Path, samples: Sequence[Sample], predictions: Iterable[Prediction], rule: Rule = "exact"
) -> Counts:
    """Write `path`.jsonl with everything, and `path`.tsv as VLMEvalKit scores it (the bare answer in `prediction`).

    Args:
        path: without its ending.
        samples: those of the predictions, in their order.
        predictions: consumed one at a time; none stays in memory once it is written.
        rule: by which answers are right.

    Returns:
        The counts that the summary is made of.
    """
    counts = Counts(rule)
    write_jsonl(f"{path}.jsonl", (prediction.to_json() for prediction in counts.counted(predictions)))
    written = zip(samples, read_jsonl(f"{path}.jsonl"), strict=True)
    rows = ((sample, row["prediction"], row["rationale"]) for sample, (_, row) in written)
    write_predictions_tsv(f"{path}.tsv", rows, prediction_columns(samples))
    return counts


def predict(sample: Sample, text: str, rule: Rule = "exact") -> Prediction:
    """Parse and verify one response; its answer is right by a rule."""
    parsed = parse_response(text)
    right = is_right_by(rule, sample, parsed.answer)
    return Prediction(sample, text, parsed.rationale, parsed.answer, right, verify_sample(sample, parsed))


def predict_judged(sample: Sample, text: str, judged: JudgeScores | str) -> Prediction:
    """Parse one response to a question that calls for a free answer; it is right if it scores as high as the reference's."""
    right = isinstance(judged, JudgeScores) and judged.prediction >= judged.reference
    return Prediction(sample, text, parse_response(text).rationale, free_answer(text), right, None, judged)


class Counts:
    """The counts of predictions that `summarise` needs; they take the same memory for any number of predictions.

    Those of HallusionBench's figures and questions, of rotated questions and of categories grow with these.
    """

    def __init__(self, rule: Rule = "exact") -> None:
        self.of_rule = RuleScores(rule)
        self.of_categories: dict[tuple[str, str], CategoryCounts] = defaultdict(partial(CategoryCounts, rule))
        self.unscored: Counter[str] = Counter()  # free answers without scores, by reason
        self.of_all: Counter[str] = Counter()
        self.of_ability: dict[str, Counter[str]] = defaultdict(Counter)
        self.cases = dict.fromkeys(CASES, 0)

    def counted(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """Count each prediction and yield it."""
        for prediction in predictions:
            self.add(prediction)
            yield prediction

    def add(self, prediction: Prediction) -> None:
        """Count one prediction."""
        judgement, sample = prediction.judgement, prediction.sample
        categories = categories_of(self.of_rule.rule, sample)
        for category in categories:
            self.of_categories[category].add(prediction)
        times = max(1, sum(column == "category" for column, _ in categories))
        self.of_rule.add(sample, prediction.answer, prediction.right, times, prediction.scores)
        self.unscored.update([prediction.judged] if isinstance(prediction.judged, str) else [])
        values: dict[str, int] = {"n": 1, "right": prediction.right, "unparsed": prediction.answer is None}
        if judgement is not None:
            self.cases[judgement.case] += 1
            values |= {
                "verified": 1,
                "aligned": judgement.aligned,
                "rationale_right": judgement.rationale_right,
                "perception_right": judgement.perception_right,
                "reasoning_right": judgement.reasoning_right,
            }
        for counts in (self.of_all, self.of_ability[str(sample.extra.get("ability", "all"))]):
            for name, value in values.items():
                counts[name] += value


@dataclass
class CategoryCounts:
    """The counts of one category's predictions."""

    rule: Rule
    n: int = 0
    right: int = 0
    of_rule: RuleScores = field(init=False)

    def __post_init__(self) -> None:
        self.of_rule = RuleScores(self.rule)

    def add(self, prediction: Prediction) -> None:
        """Count one prediction."""
        self.n += 1
        self.right += prediction.right
        self.of_rule.add(prediction.sample, prediction.answer, prediction.right, judged=prediction.scores)


def summarise(counts: Counts, *, model: str, dataset: str, split: str, resamples: int, seed: int) -> dict[str, Any]:
    """Return one entry of `summary.json`'s `evaluations`.

    `accuracy` is the share of right answers, by `rule`; `scores` has what the rule's benchmarks report beside it, and
    `by_category` both for each value of the columns CATEGORY_COLUMNS that has 2 to MOST_CATEGORIES of them. `alignment` is the
    share of samples whose answer is right and whose rationale is right and leads to it; `rationale_accuracy` the share whose
    rationale is right. A response that does not parse counts as wrong. Intervals are 95 % percentile bootstraps over samples.
    Shares of alignment and rationales are over the samples that the oracle can verify.
    """
    totals = counts.of_all
    n, verified = totals["n"], totals["verified"]
    entry: dict[str, Any] = {
        "model": model,
        "dataset": dataset,
        "split": split,
        "n": n,
        "accuracy": totals["right"] / n,
        "accuracy_ci95": _interval_of_share(totals["right"], n, resamples, seed),
        "rule": counts.of_rule.rule,
        "scores": counts.of_rule.scores(),
        "unparsed": totals["unparsed"],
        "by_ability": {
            ability: {
                "n": group["n"],
                "accuracy": group["right"] / group["n"],
                "alignment": group["aligned"] / group["verified"] if group["verified"] else None,
            }
            for ability, group in sorted(counts.of_ability.items())
        },
        "by_category": _by_category(counts, resamples, seed),
    }
    if not verified:
        return entry | {"rationale_accuracy": None, "right_answer_wrong_rationale": None, "alignment": None}
    return entry | {
        "rationale_accuracy": totals["rationale_right"] / verified,
        "rationale_accuracy_ci95": _interval_of_share(totals["rationale_right"], verified, resamples, seed),
        "perception_accuracy": totals["perception_right"] / verified,
        "reasoning_accuracy": totals["reasoning_right"] / verified,
        "right_answer_wrong_rationale": counts.cases["right_answer_wrong_rationale"] / verified,
        "alignment": totals["aligned"] / verified,
        "alignment_ci95": _interval_of_share(totals["aligned"], verified, resamples, seed),
        "cases": dict(counts.cases),
    }


def _by_category(counts: Counts, resamples: int, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Return n, accuracy with its interval, and the rule's scores, by column and value."""
    by_column: dict[str, dict[str, dict[str, Any]]] = {}
    for column in CATEGORY_COLUMNS:
        values = {value: group for (of, value), group in sorted(counts.of_categories.items()) if of == column}
        if 2 <= len(values) <= MOST_CATEGORIES:
            by_column[column] = {
                value: {
                    "n": group.n,
                    "accuracy": group.right / group.n,
                    "accuracy_ci95": _interval_of_share(group.right, group.n, resamples, seed),
                    "scores": group.of_rule.scores(),
                }
                for value, group in values.items()
            }
    return by_column


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int) -> list[float]:
    """Return the 95 % percentile bootstrap interval of the mean of `values` [n] (Efron, 1979): [low, high]."""
    levels, counts = np.unique(values, return_counts=True)
    generator, n = np.random.default_rng(seed), len(values)
    # How often a resample has each distinct value is multinomial, so no sample is drawn by itself. One resample after the
    # other: all at once would take gigabytes where there are many distinct values.
    means = [generator.multinomial(n, counts / n) @ levels / n for _ in range(resamples)]
    low, high = np.quantile(means, _ENDS)
    return [float(low), float(high)]


def _interval_of_share(hits: int, n: int, resamples: int, seed: int) -> list[float]:
    """Return `bootstrap_interval` of n values, of which `hits` are 1 and the others 0."""
    return bootstrap_interval(np.repeat([0.0, 1.0], [n - hits, hits]), resamples, seed)


def answers_in_chunks(
    chunks: Chunks,
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    settings: EvaluationConfig,
    *,
    features: ImageFeatures,
) -> ChunkFiles:
    """Run `answer_greedily` chunk by chunk; rows {id, text}, which `predictions_of` reads."""

    def work(chunk: Sequence[Sample]) -> ChunkResult:
        features.clear()  # nothing may carry over from one chunk to the next
        predictions = answer_greedily(
            model,
            chunk,
            features,
            settings.max_new_tokens,
            settings.batch_size,
            chunks.progress,
            settings.cuda_graphs,
            memory,
        )
        return [{"id": prediction.sample.id, "text": prediction.text} for prediction in predictions], {}

    with decoding_memory(model) as memory:
        files = run_chunks(chunks, samples, BATCHES * settings.batch_size, work, in_step_with(model))
    features.clear()
    return files


def write_evaluation(
    path: Path, answers: ChunkFiles, dataset: EvaluationSet, model: str, config: Config
) -> dict[str, Any]:
    """Write the predictions on an evaluation set to `path` (without ending); return its entry of `summary.json`.

    Free answers go to the judge first; its replies are in a directory beside the predictions.
    """
    samples, resamples = dataset.samples, config.evaluation.bootstrap_resamples
    if dataset.rule == "judge":
        predictions = judged_predictions(config, samples, answers, path.with_name(f"{path.name}.asked"))
    else:
        predictions = predictions_of(samples, answers, dataset.rule)
    counts = write_predictions(path, samples, predictions, dataset.rule)
    labels = {"model": model, "dataset": dataset.name, "split": dataset.split}
    entry = summarise(counts, **labels, resamples=resamples, seed=config.seed)
    return entry | (_judge_entry(counts, config) if dataset.rule == "judge" else {})


def judged_predictions(
    config: Config, samples: Sequence[Sample], answers: ChunkFiles, asked: Path
) -> Iterator[Prediction]:
    """Have all answers scored, then yield them with their scores. Raises what `judge_answers` does."""
    texts = (row["text"] for row in answers.rows())
    judgements = judge_answers(
        config, ((sample, free_answer(text)) for sample, text in zip(samples, texts, strict=True)), asked
    )
    rows = zip(samples, answers.rows(), strict=True)
    return (predict_judged(sample, row["text"], judgements[sample.id]) for sample, row in rows)


def _judge_entry(counts: Counts, config: Config) -> dict[str, Any]:
    """Return who judged by which prompt, what has no scores, and the 95 % bootstrap interval of the relative score."""
    judge: dict[str, Any] = {
        "model": config.evaluation.judge_model,
        "prompt_sha256": prompt_hash(),
        "unscored": dict(counts.unscored),
    }
    if judged := counts.of_rule.judged:
        scores = np.array([(one.prediction, one.reference) for one in judged])
        generator, n = np.random.default_rng(config.seed), len(judged)
        resamples = range(config.evaluation.bootstrap_resamples)
        sums = np.array([scores[generator.integers(n, size=n)].sum(axis=0) for _ in resamples])
        judge["relative_ci95"] = np.quantile(sums[:, 0] / sums[:, 1], _ENDS).tolist()
    return {"judge": judge}


def predictions_of(samples: Sequence[Sample], answers: ChunkFiles, rule: Rule = "exact") -> Iterator[Prediction]:
    """Yield the samples' answers, parsed and verified as they are read, one at a time."""
    return (predict(sample, row["text"], rule) for sample, row in zip(samples, answers.rows(), strict=True))
