"""Measure on held-out samples how much better the model could answer than it does greedily.

pass@1 is the share of greedy answers that are right and aligned by the oracle; pass@N the share of samples of which some
candidate is; best-of-N the share whose candidate that the R-Scorer ranks first is. What the next model's greedy answers
recover of the gap from pass@1 to best-of-N says how much of the headroom preference tuning brought out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from srcfast.data.in_order import InOrder
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Candidate, Sample
from srcfast.world.verification import can_verify, verify_sample


def aligned(sample: Sample, text: str) -> bool:
    """Return whether, by the oracle, a response's answer is right and its rationale is right and leads to it."""
    judgement = verify_sample(sample, parse_response(text))
    return judgement is not None and judgement.aligned


def headroom_samples(samples: Iterable[Sample], max_samples: int) -> list[Sample]:
    """Return the first samples that the oracle can verify."""
    return list(islice(filter(can_verify, samples), max_samples))


def measure_headroom(
    samples: Sequence[Sample],
    greedy_aligned: Sequence[bool],
    candidates: Mapping[str, Sequence[Candidate]] | InOrder[list[Candidate]],
    score_rows: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """Compute pass@1, pass@N, best-of-N, and how often the R-Scorer prefers the aligned one of two candidates.

    Args:
        samples: held-out ones that the oracle can verify.
        greedy_aligned: of the same samples, whether the greedy answer is aligned.
        candidates: sample id -> candidates, read as they are needed: in the samples' order one sample's are in memory.
        score_rows: the R-Scorer's rows of those candidates, read likewise.

    Returns:
        n, n_candidates (mean), and the shares pass_at_1, pass_at_n, best_of_n, scorer_oracle_agreement (None without a pair); and
        comparisons, the number of the R-Scorer's verdicts on ordered pairs, or on candidates alone where it compares none.
    """
    rows = InOrder((str(row["sample_id"]), row) for row in score_rows)
    proposed = any_aligned = best_aligned = agreed = compared = comparisons = 0
    for sample in samples:
        group, row = candidates.get(sample.id) or (), rows.get(sample.id)
        good = [aligned(sample, candidate.text) for candidate in group]
        proposed += len(good)
        any_aligned += any(good)
        if row is None:
            continue
        best_aligned += good[int(np.argmax(row["scores"]))]
        comparisons += row["verdicts"]
        wins, raw = row["win_probability"], np.array(row["raw"])
        # Of two that were not compared both entries of `raw` are exactly 1/2; a rating of each alone, [n], compares all.
        known = np.ones((len(good), len(good)), dtype=bool) if raw.ndim == 1 else (raw != 0.5) | (raw.T != 0.5)
        # One verdict for each aligned candidate i and unaligned candidate j.
        verdicts = [
            wins[i][j] > 0.5
            for i, first in enumerate(good)
            if first
            for j, second in enumerate(good)
            if not second and known[i, j]
        ]
        agreed += sum(verdicts)
        compared += len(verdicts)
    n = len(samples)
    return {
        "n": n,
        "n_candidates": proposed / n,
        "pass_at_1": sum(greedy_aligned) / n,
        "pass_at_n": any_aligned / n,
        "best_of_n": best_aligned / n,
        "scorer_oracle_agreement": agreed / compared if compared else None,
        "comparisons": comparisons,
    }


def with_next(entry: Mapping[str, Any], next_aligned: Sequence[bool]) -> dict[str, Any]:
    """Add the next model's pass@1 and what it recovers to the entry; `next_aligned` is `greedy_aligned` of that model."""
    pass_at_1 = sum(next_aligned) / len(next_aligned)
    return {**entry, "next_pass_at_1": pass_at_1, "recovered": recovered(entry, pass_at_1)}


def recovered(headroom: Mapping[str, Any], next_pass_at_1: float) -> float | None:
    """Return the share of the gap from pass@1 to best-of-N that the next model's greedy answers close; None without a gap."""
    gap = headroom["best_of_n"] - headroom["pass_at_1"]
    return None if gap <= 0 else (next_pass_at_1 - headroom["pass_at_1"]) / gap
