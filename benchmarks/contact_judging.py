"""First contact, one judging forest of a 1.5B R-Scorer: how much of the wall clock the device works, and MFU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch

from srcfast.data.forest import Forest
from srcfast.data.prefixes import share_prefixes
from srcfast.data.records import Candidate, Sample
from srcfast.memory.activations import ForestSizes
from srcfast.memory.flops import forward_flops, peak_flops
from srcfast.memory.model_sizes import Shapes
from srcfast.models.scorer import ALONE, Scorer, all_pairs
from srcfast.stages.scoring import sample_reference, score_candidates
from srcfast_benchmarks.contact_model import random_scorer, write_directory
from srcfast_benchmarks.contact_part import Case, Cases
from srcfast_benchmarks.contact_profile import peaks, profiled
from srcfast_benchmarks.contact_results import Context
from srcfast_benchmarks.contact_training import now
from srcfast_benchmarks.random_models import JUDGE_1_5B, SMALL_JUDGE, texts, words_of

BUDGET = 65536  # tokens: all in one forest
ROUNDS = 5
TINY = replace(SMALL_JUDGE, hidden_size=64, intermediate_size=96, layers=2, heads=4, kv_heads=2, dtype="float16")
Records = tuple[list[Sample], dict[str, list[Candidate]]]


def cases(context: Context) -> Cases:
    return {"8 candidates, all pairs": judge}


def judge(case: Case) -> dict[str, Any]:
    """Score samples whose pairs make one forest; fresh texts in each round, for texts are encoded once."""
    tiny = case.context.tiny
    shape = TINY if tiny else JUDGE_1_5B
    scorer = random_scorer(write_directory(case.context.work / "judge", shape), shape, "cuda")
    torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    for number in range(ROUNDS + 1):
        samples, candidates = records(scorer, number, tiny)
        begun = now()
        score_candidates(scorer, samples, candidates, BUDGET)
        seconds.append(now() - begun)
        case.store(ms_of_rounds=[1000 * one for one in seconds])
    sizes = forest_sizes(scorer, samples, candidates)
    middle = median(seconds[1:])
    flops = forward_flops(Shapes.of(scorer.text_model.decoder.config), sizes.tokens, sizes.attended, 0)
    samples, candidates = records(scorer, ROUNDS + 1, tiny)
    return peaks() | {
        "tokens": sizes.tokens,
        "ms_a_forest": 1000 * middle,
        "tokens_per_second": sizes.tokens / middle,
        "mfu": flops / middle / peak_flops("cuda", torch.float16),
        "profile": profiled(lambda: score_candidates(scorer, samples, candidates, BUDGET)),
    }


def forest_sizes(scorer: Scorer, samples: Sequence[Sample], candidates: dict[str, list[Candidate]]) -> ForestSizes:
    """Sizes of the forest that is judged: each sample's candidates alone and in pairs."""
    trees = []
    for sample in samples:
        written = [candidate.text for candidate in candidates[sample.id]]
        pairs = [(i, ALONE) for i in range(len(written))] + all_pairs(len(written))
        trees.append(share_prefixes(scorer.judge_tree(sample_reference(sample), written, pairs).tree)[0])
    return ForestSizes.of(Forest.of(trees), "cuda")


def records(scorer: Scorer, number: int, tiny: bool) -> Records:
    """Samples with facts, and candidates by the samples' ids."""
    rng = np.random.default_rng(number)
    samples, candidates, span = (1, 3, (4, 6)) if tiny else (3, 8, (150, 220))
    drawn = texts(words_of(scorer.text_model.tokenizer), rng, *span)
    made = [Sample(str(i), (), "what is it", "yes", facts=(next(drawn),)) for i in range(samples)]
    return made, {
        sample.id: [Candidate(f"{sample.id}#{k}", sample.id, next(drawn), "", "", 0.0) for k in range(candidates)]
        for sample in made
    }
