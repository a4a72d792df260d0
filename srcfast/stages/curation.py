"""Stage 4, first half: turn scored candidates into preference pairs, best against worst, and count each drop by its reason.

The formulas are "Our reading" of the SRC paper (an implementation of its abstract, not its unpublished code).
With p_ij the R-Scorer's probability that candidate i, shown first, beats candidate j, shown second:

    q_ij = (p_ij + 1 - p_ji) / 2                      the order's bias cancelled
    u_ij = |2 q_ij - 1| (1 - |p_ij + p_ji - 1|)       0 if neutral, 0 if it flips with the order
    S_i  = sum_j u_ij q_ij / sum_j u_ij               1/2 where the sum is 0

`srcfast_kernels.pairwise_verdict` computes them when candidates are scored; here they are read from the score rows:
S as `scores`, u as `confidence`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import numpy as np

from srcfast.config.settings import CurationConfig
from srcfast.data.answers import is_right
from srcfast.data.gc_pauses import pause_full_collections
from srcfast.data.in_order import InOrder
from srcfast.data.rationale_format import parse_response
from srcfast.data.rationale_pairs import build_raps
from srcfast.data.records import Candidate, Preference, Sample, first_of_texts
from srcfast.errors import InputError
from srcfast.stages.adaptive_pairs import SMALLEST_SCORE
from srcfast.stages.derived_pairs import derived_pairs

TRUE = "#true"  # what the id of a sample's rationale as a candidate ends with
BINS = 20  # of the histograms over [0, 1]

# The funnel's steps: samples, then pairs, that pass each; and the reasons of drops, in the order in which they are tested.
STEPS = (
    "samples",
    "with_two_parsed_distinct",
    "with_pair",
    "pairs_proposed",
    "within_margin",
    "within_confidence",
    "kept",
)
REASONS = (
    "fewer_than_two_candidates",
    "fewer_than_two_parsed",
    "not_scored",
    "same_correctness",
    "no_true_rationale",
    "margin",
    "confidence",
    "rating",
    "length",
    "does_not_fit",
)


@dataclass
class Funnel:
    """How many samples, then pairs, pass each of `STEPS`, and how many are dropped for each of `REASONS`."""

    passed: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Return the counts in order, zeros included."""
        return {step: self.passed[step] for step in STEPS} | {
            "dropped": {reason: self.dropped[reason] for reason in REASONS}
        }


@pause_full_collections()
def curate(
    samples: Sequence[Sample],
    candidates: Mapping[str, Sequence[Candidate]] | InOrder[list[Candidate]],
    score_rows: Iterable[Mapping[str, Any]],
    settings: CurationConfig,
    seed: int = 0,
    fits: Callable[[Preference], bool] = lambda pair: True,
) -> tuple[list[Preference], dict[str, Any]]:
    """Choose preference pairs and count what was dropped and why.

    Args:
        samples: in the order in which their pairs come out.
        candidates: sample id -> its candidates.
        score_rows: rows of `score_candidates`, read as they are needed: in the samples' order one is in memory at a time.
            Samples without a row can't be paired by score and are dropped as "not_scored" (the baselines don't need rows).
        settings: thresholds, pairing, weighting.
        seed: with the sample's id it decides the baselines' draws; a sample's pair depends on nothing else.
        fits: whether a training has room for a pair; others are dropped as "does_not_fit".

    Returns:
        The preferences, a sample's derived ones behind its judged ones, and the funnel: counts of samples and of judged pairs
        in order, `dropped` by reason, counts of derived pairs where the settings ask for them, the rates and histograms
        that show whether the R-Scorer can be trusted (None without data), and what it all took: the tokens of the candidates,
        and the R-Scorer's comparisons.

    Raises:
        InputError: a score row names other candidates than the sample has, or lacks the ratings that the settings need.
    """
    rows = InOrder((str(row["sample_id"]), row) for row in score_rows)
    statistics, funnel, candidate_tokens = ScorerStatistics(), Funnel(), 0
    preferences: list[Preference] = []
    judged: list[Preference] = []
    derived = Counter({name: 0 for name in ("left_out_negatives", "rationale_pairs") if getattr(settings, name)})
    for sample in samples:
        sample_candidates = list(candidates.get(sample.id) or ())
        row = rows.get(sample.id)
        _check_row(sample, sample_candidates, row, settings)
        candidate_tokens += sum(len(candidate.token_ids) for candidate in sample_candidates)
        if row is not None:
            statistics.add(row, sample_candidates)
        proposed = _sample_pairs(sample, sample_candidates, row, settings, seed, funnel)
        of_sample = [pair for pair in proposed if fits(pair)]
        judged += of_sample
        preferences += of_sample
        funnel.dropped["does_not_fit"] += len(proposed) - len(of_sample)
        for kind, pair in derived_pairs(of_sample, settings, seed):
            if fits(pair):
                derived[kind] += 1
                preferences.append(pair)
            else:
                funnel.dropped["does_not_fit"] += 1
    funnel.passed["kept"] = len(judged)
    compute = {"candidate_tokens": candidate_tokens, "comparisons": int(statistics.verdicts)}
    return preferences, funnel.to_json() | derived | _pair_statistics(judged) | statistics.result() | compute


def _sample_pairs(
    sample: Sample,
    candidates: Sequence[Candidate],
    row: Mapping[str, Any] | None,
    settings: CurationConfig,
    seed: int,
    funnel: Funnel,
) -> list[Preference]:
    """Return one sample's preference pairs; count in the funnel what passes and what is dropped."""
    funnel.passed["samples"] += 1
    if settings.pairing == "true":
        true = _true_candidate(sample, candidates)
        texts = {candidate.text for candidate in true}  # a candidate of the same text is the true one
        candidates, row = [*true, *(c for c in candidates if c.text not in texts)], None
    eligible = _parsed_distinct(candidates)
    if len(eligible) < 2:
        funnel.dropped["fewer_than_two_parsed" if len(candidates) >= 2 else "fewer_than_two_candidates"] += 1
        return []
    funnel.passed["with_two_parsed_distinct"] += 1
    proposed, reason = _propose(sample, candidates, eligible, row, settings, Random(f"{seed}/{sample.id}"))
    if reason is not None:
        funnel.dropped[reason] += 1
        return []
    funnel.passed["with_pair"] += 1
    funnel.passed["pairs_proposed"] += len(proposed)
    pairs = []
    for best, worst in proposed:
        reason = _drop_reason(candidates, row, best, worst, settings)
        # A pair that fails a later threshold has passed the earlier ones.
        if reason != "margin":
            funnel.passed["within_margin"] += 1
            if reason != "confidence":
                funnel.passed["within_confidence"] += 1
        if reason is None:
            pairs.append(_preference(sample, candidates, row, best, worst, settings))
        else:
            funnel.dropped[reason] += 1
    return pairs


def check_pairs_left(pairs: Sequence[Preference], funnel: Mapping[str, Any]) -> None:
    """Raise InputError where no pair is left to train on."""
    if not pairs:
        raise InputError(
            field="curation",
            expected="at least one preference pair",
            found=f"dropped: {funnel['dropped']}",
            fix="lower curation.min_margin or curation.min_confidence, or raise candidates.temperature",
        )


class ScorerStatistics:
    """Rates and histograms over all scored candidates: do order or length sway the R-Scorer?

    `order_flip_rate` is over unordered pairs; `order_shift` is the mean of p - 1/2 over ordered pairs, above 0 where whoever is
    shown first gains by it; `tie_rate` is over verdicts, `mean_confidence` over unordered pairs of distinct
    texts. `length_correlation` is Pearson's between score and response length in tokens, both taken from their mean within
    the sample, since scores compare candidates of one sample only.
    """

    def __init__(self) -> None:
        self.flips = self.pairs = self.ties = self.verdicts = self.shifts = self.shifted_pairs = 0.0
        self.scores = np.zeros(BINS, dtype=np.int64)
        self.confidences = np.zeros(BINS, dtype=np.int64)
        self.confidence_sum = 0.0
        self.products = np.zeros(3)  # sums of score squared, length squared, score times length, from their means

    def add(self, row: Mapping[str, Any], candidates: Sequence[Candidate]) -> None:
        """Count one sample's score row over its candidates, each text once."""
        self.flips += row["flip_rate"] * row["pairs"]
        self.pairs += row["pairs"]
        self.ties += row["tie_rate"] * row["verdicts"]
        self.verdicts += row["verdicts"]
        distinct = list(first_of_texts(candidates).values())
        raw = np.array(row.get("raw", 0.5), dtype=np.float64)
        if raw.ndim == 2:  # of pairs; 1/2 where there is no comparison
            shifts = raw[np.ix_(distinct, distinct)] - 0.5
            self.shifts += float(shifts.sum() - shifts.trace()) / 2
            self.shifted_pairs += row["pairs"]
        values = np.array(row["scores"], dtype=np.float64)[distinct]
        above = np.triu_indices(len(distinct), 1)
        confidences = np.array(row["confidence"], dtype=np.float64)[np.ix_(distinct, distinct)][above]
        self.scores += _counts(values)
        self.confidences += _counts(confidences)
        if row["pairs"]:  # adaptive scoring leaves some pairs out: their confidences, all 0, are no measurements
            self.confidences[0] -= len(confidences) - row["pairs"]
        self.confidence_sum += float(confidences.sum())
        lengths = np.array([_length(candidates[i]) for i in distinct], dtype=np.float64)
        values, lengths = values - values.mean(), lengths - lengths.mean()
        self.products += (values @ values, lengths @ lengths, values @ lengths)

    def result(self) -> dict[str, Any]:
        """Return the funnel's entries; None where there is nothing to take a rate of."""
        norm = float(np.sqrt(self.products[0] * self.products[1]))
        confidences = int(self.confidences.sum())
        return {
            "order_flip_rate": self.flips / self.pairs if self.pairs else None,
            "order_shift": self.shifts / self.shifted_pairs if self.shifted_pairs else None,
            "tie_rate": self.ties / self.verdicts if self.verdicts else None,
            "length_correlation": float(self.products[2]) / norm if norm > 0.0 else None,
            "mean_confidence": self.confidence_sum / confidences if confidences else None,
            "score_histogram": _histogram(self.scores),
            "confidence_histogram": _histogram(self.confidences),
        }


def _check_row(
    sample: Sample, candidates: Sequence[Candidate], row: Mapping[str, Any] | None, settings: CurationConfig
) -> None:
    """Raise InputError where a score row is of other candidates, or lacks the ratings that the settings need."""
    if row is None:
        return
    ids = [candidate.id for candidate in candidates]
    if list(row["candidate_ids"]) != ids:
        raise InputError(
            sample_id=sample.id,
            field="candidate_ids",
            expected=f"scores of the candidates {ids}",
            found=row["candidate_ids"],
            fix="score these candidates again: the scores belong to another set of candidates",
        )
    if settings.min_rating and "alone" not in row:
        raise InputError(
            sample_id=sample.id,
            field="alone",
            expected="the rating of each candidate alone, which curation.min_rating needs",
            found="none",
            fix="score these candidates again, or leave curation.min_rating at 0",
        )


def _parsed_distinct(candidates: Sequence[Candidate]) -> list[int]:
    """Return the indices of candidates that parse as rationale and answer, the first of each text."""
    first_of: dict[str, int] = {}
    for index, candidate in enumerate(candidates):
        parsed = parse_response(candidate.text)
        if parsed.answer is not None and parsed.has_rationale:
            first_of.setdefault(candidate.text, index)
    return list(first_of.values())


def _propose(
    sample: Sample,
    candidates: Sequence[Candidate],
    eligible: Sequence[int],
    row: Mapping[str, Any] | None,
    settings: CurationConfig,
    rng: Random,
) -> tuple[list[tuple[int, int]], str | None]:
    """Propose up to `pairs_per_sample` (chosen, rejected) pairs of indices, or say why there is none.

    `score` pairs best with worst by S. Of the baselines, `random` draws any two, `answer` a right and a wrong answer; `gold`
    takes the likeliest with the right answer, `true` the sample's rationale, each against the likeliest other candidate.
    """
    max_pairs = settings.pairs_per_sample
    if settings.pairing == "random":
        shuffled = rng.sample(list(eligible), len(eligible))
        return list(zip(shuffled[0::2], shuffled[1::2], strict=False))[:max_pairs], None
    if settings.pairing == "answer":
        right = [i for i in eligible if _is_right(candidates[i], sample)]
        wrong = [i for i in eligible if not _is_right(candidates[i], sample)]
        if not right or not wrong:
            return [], "same_correctness"
        crossed = [(chosen, rejected) for chosen in right for rejected in wrong]
        return rng.sample(crossed, min(max_pairs, len(crossed))), None
    if settings.pairing in ("gold", "true"):
        by_likelihood = sorted(eligible, key=lambda i: (-candidates[i].logprob, i))
        if settings.pairing == "true":
            best = [i for i in eligible if candidates[i].id.endswith(TRUE)]
        else:
            best = [i for i in by_likelihood if _is_right(candidates[i], sample)][:1]
        if not best:
            return [], "no_true_rationale" if settings.pairing == "true" else "same_correctness"
        others = [i for i in by_likelihood if i not in best]
        return [(best[0], other) for other in others[:max_pairs]], None
    if row is None:
        return [], "not_scored"
    scores = row["scores"]
    choosable = [i for i in eligible if _is_right(candidates[i], sample)] if settings.right_answer else eligible
    if not choosable:
        return [], "same_correctness"
    chosen = sorted(choosable, key=lambda i: (-_merit(scores[i], candidates[i], settings), i))  # the index breaks ties
    if settings.pair_choice == "disjoint":
        chosen = chosen[: min(max_pairs, len(eligible) // 2)]
    else:
        chosen = chosen[:1] * min(max_pairs, len(eligible) - 1)
    worst = sorted((i for i in eligible if i not in chosen), key=lambda i: (scores[i], -i))
    return list(zip(chosen, worst, strict=False)), None


def _merit(score: float, candidate: Candidate, settings: CurationConfig) -> float:
    """Return what candidates are chosen by: the score, or log S + likelihood_weight log pi.

    With S as the likelihood of the judgement and pi as the prior, this is a candidate's log posterior, up to a constant.
    """
    weight = settings.likelihood_weight
    return score if not weight else math.log(max(score, SMALLEST_SCORE)) + weight * candidate.logprob


def _drop_reason(
    candidates: Sequence[Candidate], row: Mapping[str, Any] | None, best: int, worst: int, settings: CurationConfig
) -> str | None:
    """Return the first threshold that the pair fails, in the funnel's order; None if it passes all."""
    if settings.pairing == "score" and row is not None:
        if row["scores"][best] - row["scores"][worst] < settings.min_margin:
            return "margin"
        confidence = row["confidence"][best][worst]
        if confidence < settings.min_confidence or confidence <= 0.0:
            return "confidence"
        if settings.min_rating and row["alone"][best] < settings.min_rating:
            return "rating"
    pair = (candidates[best], candidates[worst])
    measure = _length if all(candidate.token_ids for candidate in pair) else _words  # of both alike
    lengths = sorted(map(measure, pair))
    return "length" if lengths[1] > settings.max_length_ratio * lengths[0] else None


def _preference(
    sample: Sample,
    candidates: Sequence[Candidate],
    row: Mapping[str, Any] | None,
    best: int,
    worst: int,
    settings: CurationConfig,
) -> Preference:
    """Build the pair, without its reference; its confidence weighs it in the loss, 1 for the baselines."""
    chosen, rejected = candidates[best], candidates[worst]
    extra: dict[str, Any] = {
        "chosen_id": chosen.id,
        "rejected_id": rejected.id,
        "chosen_right": _is_right(chosen, sample),
        "rejected_right": _is_right(rejected, sample),
    }
    weight = 1.0
    if row is not None:
        extra["chosen_score"] = row["scores"][best]
        extra["rejected_score"] = row["scores"][worst]
        extra["judge_confidence"] = row["confidence"][best][worst]
        if settings.pairing == "score" and settings.weighting == "confidence":
            weight = row["confidence"][best][worst]
    return Preference(
        sample_id=sample.id,
        images=sample.images,
        prompt=sample.question,
        chosen=chosen.text,
        rejected=rejected.text,
        confidence=weight,
        reference_chosen_logprob=None,
        reference_rejected_logprob=None,
        extra=extra,
        image_root=sample.image_root,
        turns=sample.turns,
    )


def _true_candidate(sample: Sample, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the sample's rationale and answer as a candidate, written as the others are; nothing where it has no rationale."""
    format: Literal["tagged", "plain"] = "tagged" if any("<answer>" in c.text for c in candidates) else "plain"
    texts = [text for _, text in build_raps([sample], format)[0] if sample.rationale]
    return [
        Candidate(sample.id + TRUE, sample.id, text, sample.rationale or "", sample.answer, 0.0, ()) for text in texts
    ]


def _is_right(candidate: Candidate, sample: Sample) -> bool:
    """Return whether the candidate's answer is right."""
    return is_right(sample, parse_response(candidate.text).answer)


def _length(candidate: Candidate) -> int:
    """Return the response's length in tokens; in words where the candidate has no token ids (a user's file)."""
    return len(candidate.token_ids) or _words(candidate)


def _words(candidate: Candidate) -> int:
    return max(1, len(candidate.text.split()))


def _pair_statistics(preferences: Sequence[Preference]) -> dict[str, Any]:
    """Return the pairs' mean confidence, and the shares by whether chosen and rejected answer are right."""
    kinds = Counter((pair.extra["chosen_right"], pair.extra["rejected_right"]) for pair in preferences)
    total = max(1, len(preferences))
    return {
        "mean_kept_confidence": float(np.mean([p.confidence for p in preferences])) if preferences else None,
        "pair_correctness": {
            "right_over_wrong": kinds[True, False] / total,
            "right_over_right": kinds[True, True] / total,
            "wrong_over_wrong": kinds[False, False] / total,
            "wrong_over_right": kinds[False, True] / total,
        },
    }


def _counts(values: np.ndarray) -> np.ndarray:
    """Count the values in [0, 1] by bin, [BINS]; the last bin includes its upper edge."""
    bins = np.minimum((values * BINS).astype(np.int64), BINS - 1)
    return np.bincount(bins, minlength=BINS)


def _histogram(counts: np.ndarray) -> dict[str, list[float]]:
    """Return the histogram as JSON values: the bins' edges, [BINS + 1], and counts, [BINS]."""
    return {"edges": np.linspace(0.0, 1.0, BINS + 1).tolist(), "counts": counts.tolist()}
