"""How much better the model could answer than it does: measured on held-out samples before it is claimed.

pass@1 is the share of greedy answers that are right and aligned by the oracle; pass@N the share of samples of which some
candidate is; best-of-N the share whose candidate that the R-Scorer ranks first is. What the next model's greedy answers
recover of the gap from pass@1 to best-of-N says how much of the headroom preference tuning brought out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Candidate, Sample
from srcfast.world.oracle import judge_sample


def aligned(sample: Sample, text: str) -> bool:
    """Whether a response's answer is right and its rationale right and leading to it, by the oracle."""
    judgement = judge_sample(sample, parse_response(text))
    return judgement is not None and judgement.aligned


def measure_headroom(
    samples: Sequence[Sample],
    greedy_aligned: Sequence[bool],
    candidates: Mapping[str, Sequence[Candidate]],
    score_rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """pass@1, pass@N, best-of-N, and how often the R-Scorer prefers the aligned one of two candidates.

    Args:
        samples: held-out ones that the oracle can judge.
        greedy_aligned: of the same samples, whether the greedy answer is aligned.
        candidates: sample id -> candidates.
        score_rows: the R-Scorer's rows of those candidates.
    """
    rows = {row["sample_id"]: row for row in score_rows}
    some, best, agreements, counts = [], [], [], []
    for sample in samples:
        own = list(candidates.get(sample.id, ()))
        good = [aligned(sample, candidate.text) for candidate in own]
        counts.append(len(own))
        some.append(any(good))
        row = rows.get(sample.id)
        best.append(bool(row and good[int(np.argmax(row["scores"]))]))
        if row:
            wins = row["win_probability"]
            agreements += [
                wins[i][j] > 0.5 for i in range(len(own)) for j in range(len(own)) if good[i] and not good[j]
            ]
    return {
        "n": len(samples),
        "n_candidates": float(np.mean(counts)),
        "pass_at_1": float(np.mean(greedy_aligned)),
        "pass_at_n": float(np.mean(some)),
        "best_of_n": float(np.mean(best)),
        "scorer_oracle_agreement": float(np.mean(agreements)) if agreements else None,
    }


def recovered(headroom: Mapping[str, Any], next_pass_at_1: float) -> float | None:
    """Share of the gap from pass@1 to best-of-N that the next model's greedy answers close; None without a gap."""
    gap = headroom["best_of_n"] - headroom["pass_at_1"]
    return None if gap <= 0 else (next_pass_at_1 - headroom["pass_at_1"]) / gap
