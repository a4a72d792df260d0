"""Evaluation: greedy answers, read by the one parser, scored against the gold answer and, in the world, by the oracle."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from srcfast.config.settings import Config, EvaluationConfig
from srcfast.data.convert import letters_of, write_predictions_tsv
from srcfast.data.gc_pauses import pause_full_collections
from srcfast.data.jsonl import read_jsonl, write_jsonl
from srcfast.data.rationale_format import normalise_answer, parse_response
from srcfast.data.records import Sample
from srcfast.data.vlmeval import QUESTION_KEY
from srcfast.generation.buffers import DecodingMemory
from srcfast.generation.generate import Features, generate_greedy
from srcfast.models.lora import folded_lora
from srcfast.models.lvlm import ImageFeatures
from srcfast.models.sharding import in_step_with
from srcfast.run.chunks import BATCHES, ChunkFiles, ChunkResult, Chunks, run_chunks
from srcfast.stages.candidates import Progress, decoding_memory, prompts_of
from srcfast.stages.datasets import EvaluationSet
from srcfast.world.oracle import CASES, Judgement, verify_sample


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
    memory: DecodingMemory | None = None,
) -> list[Prediction]:
    """Greedy responses of an LVLM to every sample, parsed and judged; `progress` is told of samples and tokens.

    `graphs`: on a GPU, replay steps as CUDA graphs. `memory`: a `decoding_memory` of the stage; default: one for this call.
    """
    on_batch = None if progress is None else progress.advance
    with folded_lora(model):
        prompts = prompts_of(model, samples)
        generated = generate_greedy(model, prompts, features, max_new_tokens, batch_size, on_batch, graphs, memory)
    with pause_full_collections():
        return [predict(s, model.decode(one.token_ids)) for s, one in zip(samples, generated, strict=True)]


def write_predictions(path: Path, samples: Sequence[Sample], predictions: Iterable[Prediction]) -> Counts:
    """Write `path`.jsonl with everything, and `path`.tsv as VLMEvalKit scores it (the bare answer in `prediction`).

    Args:
        path: without its ending.
        samples: those of the predictions, in their order.
        predictions: made as they are asked for; none is held once it is written.

    Returns:
        What the summary needs of them.
    """
    counts = Counts()
    write_jsonl(f"{path}.jsonl", (prediction.to_json() for prediction in counts.counted(predictions)))
    written = zip(samples, read_jsonl(f"{path}.jsonl"), strict=True)
    letters = letters_of(sample.extra.get("options") for sample in samples)
    write_predictions_tsv(f"{path}.tsv", (_table_row(sample, row) for sample, (_, row) in written), letters)
    return counts


def _table_row(sample: Sample, row: dict[str, Any]) -> dict[str, Any]:
    """With what a table of VLMEvalKit's had beside: the question before its options were written into it, the split."""
    extra = sample.extra
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
    return Prediction(sample, text, parsed.rationale, parsed.answer, right, verify_sample(sample, parsed))


class Counts:
    """What `summarise` needs of predictions, counted as they pass by: it takes the same memory for any number of them."""

    def __init__(self) -> None:
        self.of_all: Counter[str] = Counter()
        self.of_ability: dict[str, Counter[str]] = defaultdict(Counter)
        self.cases = dict.fromkeys(CASES, 0)

    def counted(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """The same predictions, each counted before it is handed on."""
        for prediction in predictions:
            self.add(prediction)
            yield prediction

    def add(self, prediction: Prediction) -> None:
        """Count one prediction."""
        judgement = prediction.judgement
        found: dict[str, int] = {"n": 1, "right": prediction.right, "unparsed": prediction.answer is None}
        if judgement is not None:
            self.cases[judgement.case] += 1
            found |= {
                "judged": 1,
                "aligned": judgement.aligned,
                "rationale_right": judgement.rationale_right,
                "perception_right": judgement.perception_right,
                "reasoning_right": judgement.reasoning_right,
            }
        for counts in (self.of_all, self.of_ability[str(prediction.sample.extra.get("ability", "all"))]):
            for name, value in found.items():
                counts[name] += value


def summarise(counts: Counts, *, model: str, dataset: str, split: str, resamples: int, seed: int) -> dict[str, Any]:
    """One entry of `summary.json`'s `evaluations`.

    `accuracy` is the share of right answers; `alignment` the share of samples whose answer is right and whose
    rationale is right and leads to it; `rationale_accuracy` the share whose rationale is right. A response that does
    not parse counts as wrong. Intervals are 95 % percentile bootstraps over samples.
    """
    found = counts.of_all
    n, judged = found["n"], found["judged"]
    entry: dict[str, Any] = {
        "model": model,
        "dataset": dataset,
        "split": split,
        "n": n,
        "accuracy": found["right"] / n,
        "accuracy_ci95": _interval_of_share(found["right"], n, resamples, seed),
        "unparsed": found["unparsed"],
        "by_ability": {
            ability: {
                "n": group["n"],
                "accuracy": group["right"] / group["n"],
                "alignment": group["aligned"] / group["judged"] if group["judged"] else None,
            }
            for ability, group in sorted(counts.of_ability.items())
        },
    }
    if not judged:
        return entry | {"rationale_accuracy": None, "right_answer_wrong_rationale": None, "alignment": None}
    return entry | {
        "rationale_accuracy": found["rationale_right"] / judged,
        "rationale_accuracy_ci95": _interval_of_share(found["rationale_right"], judged, resamples, seed),
        "perception_accuracy": found["perception_right"] / judged,
        "reasoning_accuracy": found["reasoning_right"] / judged,
        "right_answer_wrong_rationale": counts.cases["right_answer_wrong_rationale"] / judged,
        "alignment": found["aligned"] / judged,
        "alignment_ci95": _interval_of_share(found["aligned"], judged, resamples, seed),
        "cases": dict(counts.cases),
    }


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int) -> list[float]:
    """95 % percentile bootstrap interval of the mean of `values` [n] (Efron, 1979): [low, high]."""
    levels, counts = np.unique(values, return_counts=True)
    return _interval(levels, counts, resamples, seed)


def _interval_of_share(hits: int, n: int, resamples: int, seed: int) -> list[float]:
    """`bootstrap_interval` of n values, of which so many are 1 and the others 0."""
    counts = np.array([n - hits, hits])
    there = counts > 0
    return _interval(np.array([0.0, 1.0])[there], counts[there], resamples, seed)


def _interval(levels: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> list[float]:
    """The interval from the distinct values, ascending, and how often each is there."""
    generator, n = np.random.default_rng(seed), int(counts.sum())
    # How often a resample holds each distinct value is multinomial: drawing that asks for no sample one by one. One resample
    # after the other, since all at once would take some gigabytes where there are many values.
    means = [generator.multinomial(n, counts / n) @ levels / n for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(low), float(high)]


def answers_in_chunks(
    chunks: Chunks,
    model: Any,
    samples: Sequence[Sample],
    settings: EvaluationConfig,
    *,
    features: ImageFeatures,
) -> ChunkFiles:
    """`answer_greedily`, as rows {id, text}; `predictions_of` reads them."""

    def work(piece: Sequence[Sample]) -> ChunkResult:
        features.clear()
        found = answer_greedily(
            model,
            piece,
            features,
            settings.max_new_tokens,
            settings.batch_size,
            chunks.progress,
            settings.cuda_graphs,
            memory,
        )
        return [{"id": one.sample.id, "text": one.text} for one in found], {}

    with decoding_memory(model) as memory:
        parts = run_chunks(chunks, samples, BATCHES * settings.batch_size, work, in_step_with(model))
    features.clear()
    return parts


def evaluated(path: Path, answers: ChunkFiles, dataset: EvaluationSet, model: str, config: Config) -> dict[str, Any]:
    """Write the predictions on an evaluation set to `path` (without ending); returns its entry of `summary.json`."""
    return summarise(
        write_predictions(path, dataset.samples, predictions_of(dataset.samples, answers)),
        model=model,
        dataset=dataset.name,
        split=dataset.split,
        resamples=config.evaluation.bootstrap_resamples,
        seed=config.seed,
    )


def predictions_of(samples: Sequence[Sample], answers: ChunkFiles) -> Iterator[Prediction]:
    """The samples' answers, parsed and judged as they are read, one at a time."""
    return (predict(sample, row["text"]) for sample, row in zip(samples, answers.rows(), strict=True))
