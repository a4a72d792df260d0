"""Judging of candidates in pairs: srcfast's packed trees against transformers' batched forward passes over the same tokens.

transformers runs every ordered pair as a sequence of its own, sorted by length, padded, with the logits of the last position
alone; srcfast runs each sample's pairs as one tree. Both give the same probability that the first candidate wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srcfast.data.records import Candidate, Sample
from srcfast_benchmarks.harness import Shape
from srcfast_benchmarks.random_models import JUDGE_1B, SMALL_JUDGE, ModelShape, texts, words_of, write_model
from srcfast_benchmarks.stage_harness import StageBenchmark, Watch, main

SHAPES: dict[str, list[Shape]] = {
    "cpu": [{"model": "5M", "samples": 16, "candidates": 8, "dtype": "float32"}],
    "cuda": [{"model": "1.3B", "samples": 256, "candidates": 8, "dtype": "float16"}],
}
MODELS: dict[str, ModelShape] = {"5M": SMALL_JUDGE, "1.3B": JUDGE_1B}
REFERENCE_WORDS = {"5M": (60, 90), "1.3B": (150, 220)}
CANDIDATE_WORDS = {"5M": (20, 60), "1.3B": (120, 220)}
BUDGET = 16384  # tokens in one forward, of either
ROUNDS = 3


def prepare(shape: Shape, folder: Path, device: str) -> None:
    write_model(folder / "model", MODELS[shape["model"]], device)


def load(shape: Shape, folder: Path, device: str) -> Any:
    from srcfast.models.scorer import load_scorer

    return load_scorer(folder / "model", verdict_form="graded", dtype=getattr(torch, shape["dtype"]), device=device)


def records(shape: Shape, scorer: Any, number: int) -> tuple[list[Sample], dict[str, list[Candidate]]]:
    """Samples with facts, and their candidates, drawn anew for each round."""
    rng = np.random.default_rng(number)
    words = words_of(scorer.text_model.tokenizer)
    facts, responses = (texts(words, rng, *of[shape["model"]]) for of in (REFERENCE_WORDS, CANDIDATE_WORDS))
    samples = [Sample(str(i), (), "what is it", "yes", facts=(next(facts),)) for i in range(shape["samples"])]
    found = {
        sample.id: [
            Candidate(f"{sample.id}#{k}", sample.id, next(responses), "", "", 0.0) for k in range(shape["candidates"])
        ]
        for sample in samples
    }
    return samples, found


def srcfast(shape: Shape, folder: Path, device: str, watch: Watch) -> None:
    from srcfast.stages.scoring import score_candidates

    scorer = load(shape, folder, device)
    watch.start()
    for number in range(ROUNDS):
        with watch.paused():
            samples, candidates = records(shape, scorer, number)
        rows = score_candidates(scorer, samples, candidates, BUDGET)
        wins = np.array([row["raw"] for row in rows])  # [S, N, N]
        off = ~np.eye(wins.shape[1], dtype=bool)
        watch.lap(len(samples), value=float(wins[:, off].mean()))


def transformers(shape: Shape, folder: Path, device: str, watch: Watch) -> None:
    """The judge's own prompts, and nothing shared."""
    from transformers import AutoModelForCausalLM

    from srcfast.models.scorer import all_pairs
    from srcfast.stages.scoring import sample_reference

    scorer = load(shape, folder, "cpu")
    dtype = getattr(torch, shape["dtype"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, device_map=device).eval()
    ids, values = scorer.verdict_token_ids.to(device), scorer.verdict_values.double()
    watch.start()
    for number in range(ROUNDS):
        with watch.paused():
            samples, candidates = records(shape, scorer, number)
        sequences: list[np.ndarray] = []
        for sample in samples:
            own = [candidate.text for candidate in candidates[sample.id]]
            judged = scorer.judge_tree(sample_reference(sample), own, all_pairs(len(own)))
            parts = judged.tree.segments
            for slot in judged.slots.tolist():
                first = parts[slot].parent
                sequences.append(np.concatenate([parts[0].tokens, parts[first].tokens, parts[slot].tokens]))
        total = 0.0
        for batch in _batches(sequences):
            width = len(batch[-1])
            tokens = torch.zeros(len(batch), width, dtype=torch.int64)  # padded on the left
            mask = torch.zeros_like(tokens)
            for row, sequence in enumerate(batch):
                tokens[row, width - len(sequence) :] = torch.from_numpy(sequence)
                mask[row, width - len(sequence) :] = 1
            inputs = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
            with torch.inference_mode():
                logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, ids]
            total += float((logits.double().softmax(-1).cpu() @ values).sum())
        watch.lap(len(samples), value=total / len(sequences))


def _batches(sequences: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Sequences of like length together, at most BUDGET tokens with their padding."""
    batch: list[np.ndarray] = []
    for sequence in sorted(sequences, key=len):
        if (len(batch) + 1) * len(sequence) > BUDGET:
            yield batch
            batch = []
        batch.append(sequence)
    yield batch


BENCHMARK = StageBenchmark(
    name="judging",
    unit="samples",
    shapes=SHAPES,
    prepare=prepare,
    implementations={"transformers": transformers, "srcfast": srcfast},
    headline="srcfast",
    tolerance=1e-4,
)

if __name__ == "__main__":
    main(BENCHMARK)
