"""Evaluation: greedy answers, read by the one parser, scored against the gold answer and, in the world, by the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from srcfast.data.collector import no_full_passes
from srcfast.data.convert import write_predictions_tsv
from srcfast.data.jsonl import write_jsonl
from srcfast.data.rationale_format import normalise_answer, parse_response
from srcfast.data.records import Sample
from srcfast.data.vlmeval import QUESTION_KEY
from srcfast.models.lora import folded_lora
from srcfast.runtime.generation import Features, generate_greedy
from srcfast.stages.candidates import Progress, prompts_of
from srcfast.world.oracle import CASES, Judgement, judge_sample


@dataclass(frozen=True)
class Prediction:
    """One sample's greedy response, parsed and judged."""

    sample: Sample
    text: str
    rationale: str
    answer: str | None  # None: the response did not parse
    right: bool
    judgement: Judgement | None  # None: the sample carries no scene to check a rationale against

    def to_json(self) -> dict[str, Any]:
        """The row of `predictions`: `prediction` is the bare answer, as VLMEvalKit scores it."""
        return {
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
    model: Any,
    samples: Sequence[Sample],
    features: Features,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
    graphs: bool = True,
) -> list[Prediction]:
    """Greedy responses of an LVLM to every sample, parsed and judged; `progress` is told of samples and tokens.

    `graphs`: on a GPU, replay steps as CUDA graphs.
    """
    on_batch = None if progress is None else progress.advance
    with folded_lora(model):
        prompts = prompts_of(model, samples)
        generated = generate_greedy(model, prompts, features, max_new_tokens, batch_size, on_batch, graphs)
    with no_full_passes():
        return [predict(s, model.decode(one.token_ids)) for s, one in zip(samples, generated, strict=True)]


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write `path`.jsonl with everything, and `path`.tsv as VLMEvalKit scores it (the bare answer in `prediction`)."""
    rows = [prediction.to_json() for prediction in predictions]
    write_jsonl(f"{path}.jsonl", rows)
    write_predictions_tsv(f"{path}.tsv", map(_table_row, predictions, rows))


def _table_row(prediction: Prediction, row: dict[str, Any]) -> dict[str, Any]:
    """With what a table of VLMEvalKit's had beside: the question before its options were written into it, the split."""
    extra = prediction.sample.extra
    return row | {
        "question": extra.get(QUESTION_KEY, row["question"]),
        "options": extra.get("options"),
        "category": extra.get("category"),
        "split": extra.get("split"),
    }


def predict(sample: Sample, text: str) -> Prediction:
    """Parse and judge one response."""
    parsed = parse_response(text)
    right = parsed.answer is not None and normalise_answer(parsed.answer) == normalise_answer(sample.answer)
    return Prediction(sample, text, parsed.rationale, parsed.answer, right, judge_sample(sample, parsed))


def summarise(
    predictions: Sequence[Prediction], *, model: str, dataset: str, split: str, resamples: int, seed: int
) -> dict[str, Any]:
    """One entry of `summary.json`'s `evaluations`.

    `accuracy` is the share of right answers; `alignment` the share of samples whose answer is right and whose
    rationale is right and leads to it; `rationale_accuracy` the share whose rationale is right. A response that does
    not parse counts as wrong. Intervals are 95 % percentile bootstraps over samples.
    """
    right = np.array([p.right for p in predictions], dtype=float)
    entry: dict[str, Any] = {
        "model": model,
        "dataset": dataset,
        "split": split,
        "n": len(predictions),
        "accuracy": float(right.mean()),
        "accuracy_ci95": bootstrap_interval(right, resamples, seed),
        "unparsed": sum(p.answer is None for p in predictions),
        "by_ability": _by_ability(predictions),
    }
    judged = [p.judgement for p in predictions if p.judgement is not None]
    if not judged:
        return entry | {"rationale_accuracy": None, "right_answer_wrong_rationale": None, "alignment": None}
    aligned = np.array([j.aligned for j in judged], dtype=float)
    rationale_right = np.array([j.rationale_right for j in judged], dtype=float)
    cases = {case: sum(j.case == case for j in judged) for case in CASES}
    return entry | {
        "rationale_accuracy": float(rationale_right.mean()),
        "rationale_accuracy_ci95": bootstrap_interval(rationale_right, resamples, seed),
        "perception_accuracy": float(np.mean([j.perception_right for j in judged])),
        "reasoning_accuracy": float(np.mean([j.reasoning_right for j in judged])),
        "right_answer_wrong_rationale": cases["right_answer_wrong_rationale"] / len(judged),
        "alignment": float(aligned.mean()),
        "alignment_ci95": bootstrap_interval(aligned, resamples, seed),
        "cases": cases,
    }


def _by_ability(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(str(prediction.sample.extra.get("ability", "all")), []).append(prediction)
    return {
        ability: {
            "n": len(group),
            "accuracy": float(np.mean([p.right for p in group])),
            "alignment": _mean([p.judgement.aligned for p in group if p.judgement is not None]),
        }
        for ability, group in sorted(groups.items())
    }


def _mean(values: Sequence[bool]) -> float | None:
    return float(np.mean(values)) if values else None


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int) -> list[float]:
    """95 % percentile bootstrap interval of the mean of `values` [n] (Efron, 1979): [low, high]."""
    generator = np.random.default_rng(seed)
    # How often a resample holds each distinct value is multinomial: drawing that asks for no sample one by one. One resample
    # after the other, since all at once would take some gigabytes where there are many values.
    levels, counts = np.unique(values, return_counts=True)
    shares = counts / len(values)
    means = [generator.multinomial(len(values), shares) @ levels / len(values) for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(low), float(high)]
