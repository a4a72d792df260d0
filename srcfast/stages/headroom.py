"""How much better the model could answer than it does: measured on held-out samples before it is claimed.

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
from srcfast.world.oracle import verify_sample


def aligned(sample: Sample, text: str) -> bool:
    """Whether a response's answer is right and its rationale right and leading to it, by the oracle."""
    judgement = verify_sample(sample, parse_response(text))
    return judgement is not None and judgement.aligned


def headroom_samples(samples: Iterable[Sample], most: int) -> list[Sample]:
    """The first samples that the oracle can judge."""
    return list(islice((s for s in samples if "program" in s.extra and "scene" in s.extra), most))


def measure_headroom(
    samples: Sequence[Sample],
    greedy_aligned: Sequence[bool],
    candidates: Mapping[str, Sequence[Candidate]] | InOrder[list[Candidate]],
    score_rows: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """pass@1, pass@N, best-of-N, and how often the R-Scorer prefers the aligned one of two candidates.

    Args:
        samples: held-out ones that the oracle can judge.
        greedy_aligned: of the same samples, whether the greedy answer is aligned.
        candidates: sample id -> candidates; read as they are needed: in the samples' order one sample's are held.
        score_rows: the R-Scorer's rows of those candidates, read likewise.
    """
    rows = InOrder((str(row["sample_id"]), row) for row in score_rows)
    proposed = some = best = agreed = compared = 0
    for sample in samples:
        own, row = candidates.get(sample.id) or (), rows.get(sample.id)
        good = [aligned(sample, candidate.text) for candidate in own]
        proposed += len(good)
        some += any(good)
        if row is None:
            continue
        best += good[int(np.argmax(row["scores"]))]
        wins = row["win_probability"]
        verdicts = [wins[i][j] > 0.5 for i, one in enumerate(good) for j, other in enumerate(good) if one and not other]
        agreed += sum(verdicts)
        compared += len(verdicts)
    n = len(samples)
    return {
        "n": n,
        "n_candidates": proposed / n,
        "pass_at_1": sum(greedy_aligned) / n,
        "pass_at_n": some / n,
        "best_of_n": best / n,
        "scorer_oracle_agreement": agreed / compared if compared else None,
    }


def with_next(entry: Mapping[str, Any], next_aligned: Sequence[bool]) -> dict[str, Any]:
    """The entry with the next model's pass@1, and what it recovers; `next_aligned` as `measure_headroom`'s `greedy_aligned`."""
    pass_at_1 = sum(next_aligned) / len(next_aligned)
    return {**entry, "next_pass_at_1": pass_at_1, "recovered": recovered(entry, pass_at_1)}


def recovered(headroom: Mapping[str, Any], next_pass_at_1: float) -> float | None:
    """Share of the gap from pass@1 to best-of-N that the next model's greedy answers close; None without a gap."""
    gap = headroom["best_of_n"] - headroom["pass_at_1"]
    return None if gap <= 0 else (next_pass_at_1 - headroom["pass_at_1"]) / gap
