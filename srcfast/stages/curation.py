"""From judged candidates to preference pairs: best against worst, each drop counted by its reason.

The formulas are "Our reading" of the SRC paper (an implementation of its abstract, not its unpublished code).
With p_ij the judge's probability that candidate i, shown first, beats candidate j, shown second:

    q_ij = (p_ij + 1 - p_ji) / 2                      the order's bias cancelled
    u_ij = |2 q_ij - 1| (1 - |p_ij + p_ji - 1|)       0 if neutral, 0 if it flips with the order
    S_i  = sum_j u_ij q_ij / sum_j u_ij               1/2 where the sum is 0
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any

import numpy as np

from srcfast.config.settings import CurationConfig
from srcfast.data.gc_pauses import pause_full_collections
from srcfast.data.in_order import InOrder
from srcfast.data.rationale_format import normalise_answer, parse_response
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.errors import InputError

BINS = 20  # of the histograms over [0, 1]


@pause_full_collections()
def curate(
    samples: Sequence[Sample],
    candidates: Mapping[str, Sequence[Candidate]] | InOrder[list[Candidate]],
    score_rows: Iterable[Mapping[str, Any]],
    settings: CurationConfig,
    seed: int = 0,
) -> tuple[list[Preference], dict[str, Any]]:
    """Choose preference pairs and count what was dropped and why.

    Args:
        samples: in the order in which their pairs come out.
        candidates: sample id -> its candidates.
        score_rows: rows of `score_candidates`, read as they are needed: in the samples' order none is kept. Samples
            without a row can't be paired by score and are dropped as "not_scored" (the baselines don't need rows).
        settings: thresholds, pairing, weighting.
        seed: with the sample's id it decides the baselines' draws; a sample's pair depends on nothing else.

    Returns:
        The preferences, and the funnel: counts of samples and of pairs in order, `dropped` by reason, and the
        rates and histograms that show whether the judge can be trusted. Rates without data are None.

    Raises:
        InputError: a score row names other candidates than the sample has, or lacks the ratings that are asked for.
    """
    rows = InOrder((str(row["sample_id"]), row) for row in score_rows)
    statistics = JudgeStatistics()
    preferences: list[Preference] = []
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for sample in samples:
        own = list(candidates.get(sample.id) or ())
        row = rows.get(sample.id)
        _check_row(sample, own, row, settings)
        if row is not None:
            statistics.add(row, own)
        counts["samples"] += 1
        eligible = _parsed_distinct(own)
        if len(eligible) < 2:
            dropped["fewer_than_two_parsed" if len(own) >= 2 else "fewer_than_two_candidates"] += 1
            continue
        counts["with_two_parsed_distinct"] += 1
        rng = Random(f"{seed}/{sample.id}")
        proposed, reason = _propose(sample, own, eligible, row, settings, rng)
        if reason is not None:
            dropped[reason] += 1
            continue
        counts["with_pair"] += 1
        counts["pairs_proposed"] += len(proposed)
        for best, worst in proposed:
            reason = _drop_reason(own, row, best, worst, settings)
            for passed, failing in (("within_margin", "margin"), ("within_confidence", "confidence")):
                if reason == failing:
                    break
                counts[passed] += 1
            if reason is not None:
                dropped[reason] += 1
                continue
            preferences.append(_preference(sample, own, row, best, worst, settings))
    counts["kept"] = len(preferences)
    stages = (
        "samples",
        "with_two_parsed_distinct",
        "with_pair",
        "pairs_proposed",
        "within_margin",
        "within_confidence",
        "kept",
    )
    reasons = (
        "fewer_than_two_candidates",
        "fewer_than_two_parsed",
        "not_scored",
        "same_correctness",
        "margin",
        "confidence",
        "rating",
        "length",
    )
    funnel: dict[str, Any] = {stage: counts[stage] for stage in stages}
    funnel["dropped"] = {reason: dropped[reason] for reason in reasons}
    funnel |= _pair_statistics(preferences)
    return preferences, funnel | statistics.result()


def check_pairs_left(pairs: Sequence[Preference], funnel: Mapping[str, Any]) -> None:
    """Raise InputError where no pair is left to train on."""
    if not pairs:
        raise InputError(
            field="curation",
            expected="at least one preference pair",
            found=f"dropped: {funnel['dropped']}",
            fix="lower curation.min_margin or curation.min_confidence, or raise candidates.temperature",
        )


class JudgeStatistics:
    """Rates and histograms over all judged candidates: is the judge swayed by order or by length?

    `order_flip_rate` is over unordered pairs, `tie_rate` over verdicts, `mean_confidence` over unordered pairs of distinct
    texts. `length_correlation` is Pearson's between score and response length in tokens, both taken from their mean within
    the sample, since scores compare candidates of one sample only.
    """

    def __init__(self) -> None:
        self.flips = self.pairs = self.ties = self.verdicts = 0.0
        self.scores = np.zeros(BINS, dtype=np.int64)
        self.confidences = np.zeros(BINS, dtype=np.int64)
        self.confidence_sum = 0.0
        self.products = np.zeros(3)  # sums of score squared, length squared, score times length, from their means

    def add(self, row: Mapping[str, Any], own: Sequence[Candidate]) -> None:
        """One sample's row and its candidates."""
        self.flips += row["flip_rate"] * row["pairs"]
        self.pairs += row["pairs"]
        self.ties += row["tie_rate"] * row["verdicts"]
        self.verdicts += row["verdicts"]
        first_of: dict[str, int] = {}
        for index, candidate in enumerate(own):
            first_of.setdefault(candidate.text, index)
        distinct = list(first_of.values())
        values = np.array(row["scores"], dtype=np.float64)[distinct]
        above = np.triu_indices(len(distinct), 1)
        confidences = np.array(row["confidence"], dtype=np.float64)[np.ix_(distinct, distinct)][above]
        self.scores += _counts(values)
        self.confidences += _counts(confidences)
        if row["pairs"]:  # not those that were left alone, each 0
            self.confidences[0] -= len(confidences) - row["pairs"]
        self.confidence_sum += float(confidences.sum())
        lengths = np.array([_length(own[i]) for i in distinct], dtype=np.float64)
        values, lengths = values - values.mean(), lengths - lengths.mean()
        self.products += (values @ values, lengths @ lengths, values @ lengths)

    def result(self) -> dict[str, Any]:
        """The funnel's part; None where there is nothing to take a rate of."""
        norm = float(np.sqrt(self.products[0] * self.products[1]))
        confidences = int(self.confidences.sum())
        return {
            "order_flip_rate": self.flips / self.pairs if self.pairs else None,
            "tie_rate": self.ties / self.verdicts if self.verdicts else None,
            "length_correlation": float(self.products[2]) / norm if norm > 0.0 else None,
            "mean_confidence": self.confidence_sum / confidences if confidences else None,
            "score_histogram": _histogram(self.scores),
            "confidence_histogram": _histogram(self.confidences),
        }


def _check_row(
    sample: Sample, own: Sequence[Candidate], row: Mapping[str, Any] | None, settings: CurationConfig
) -> None:
    if row is None:
        return
    ids = [candidate.id for candidate in own]
    if list(row["candidate_ids"]) != ids:
        raise InputError(
            sample_id=sample.id,
            field="candidate_ids",
            expected=f"scores of the candidates {ids}",
            found=row["candidate_ids"],
            fix="score these candidates anew: the scores belong to another set of candidates",
        )
    if settings.min_rating and "alone" not in row:
        raise InputError(
            sample_id=sample.id,
            field="alone",
            expected="the candidates' ratings on their own, which curation.min_rating asks for",
            found="none",
            fix="score these candidates anew, or leave curation.min_rating at 0",
        )


def _parsed_distinct(own: Sequence[Candidate]) -> list[int]:
    """Indices of candidates that parse as rationale and answer, the first of each text."""
    kept: dict[str, int] = {}
    for index, candidate in enumerate(own):
        parsed = parse_response(candidate.text)
        if parsed.answer is not None and parsed.has_rationale:
            kept.setdefault(candidate.text, index)
    return list(kept.values())


def _propose(
    sample: Sample,
    own: Sequence[Candidate],
    eligible: Sequence[int],
    row: Mapping[str, Any] | None,
    settings: CurationConfig,
    rng: Random,
) -> tuple[list[tuple[int, int]], str | None]:
    """Up to pairs_per_sample (chosen, rejected) index pairs, or the reason why there is none."""
    most = settings.pairs_per_sample
    if settings.pairing == "random":
        shuffled = rng.sample(list(eligible), len(eligible))
        return list(zip(shuffled[0::2], shuffled[1::2], strict=False))[:most], None
    if settings.pairing == "answer":
        right = [i for i in eligible if _is_right(own[i], sample)]
        wrong = [i for i in eligible if not _is_right(own[i], sample)]
        if not right or not wrong:
            return [], "same_correctness"
        every = [(chosen, rejected) for chosen in right for rejected in wrong]
        return rng.sample(every, min(most, len(every))), None
    if row is None:
        return [], "not_scored"
    ranked = sorted(eligible, key=lambda i: (-row["scores"][i], i))
    if settings.pair_choice == "disjoint":
        return [(ranked[k], ranked[-1 - k]) for k in range(min(most, len(ranked) // 2))], None
    return [(ranked[0], ranked[-1 - k]) for k in range(min(most, len(ranked) - 1))], None


def _drop_reason(
    own: Sequence[Candidate], row: Mapping[str, Any] | None, best: int, worst: int, settings: CurationConfig
) -> str | None:
    """The first threshold that the pair fails, in the funnel's order."""
    if settings.pairing == "score" and row is not None:
        if row["scores"][best] - row["scores"][worst] < settings.min_margin:
            return "margin"
        confidence = row["confidence"][best][worst]
        if confidence < settings.min_confidence or confidence <= 0.0:
            return "confidence"
        if settings.min_rating and row["alone"][best] < settings.min_rating:
            return "rating"
    lengths = sorted((_length(own[best]), _length(own[worst])))
    return "length" if lengths[1] > settings.max_length_ratio * lengths[0] else None


def _preference(
    sample: Sample,
    own: Sequence[Candidate],
    row: Mapping[str, Any] | None,
    best: int,
    worst: int,
    settings: CurationConfig,
) -> Preference:
    chosen, rejected = own[best], own[worst]
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
    )


def _is_right(candidate: Candidate, sample: Sample) -> bool:
    answer = parse_response(candidate.text).answer
    return answer is not None and normalise_answer(answer) == normalise_answer(sample.answer)


def _length(candidate: Candidate) -> int:
    """Response length in tokens; in words where the candidate came without token ids (a user's own file)."""
    return max(1, len(candidate.token_ids) or len(candidate.text.split()))


def _pair_statistics(preferences: Sequence[Preference]) -> dict[str, Any]:
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
    """How many of the values in [0, 1] lie in each bin; the last bin has its upper edge."""
    places = np.minimum((values * BINS).astype(np.int64), BINS - 1)
    return np.bincount(places, minlength=BINS)


def _histogram(counts: np.ndarray) -> dict[str, list[float]]:
    return {"edges": np.linspace(0.0, 1.0, BINS + 1).tolist(), "counts": counts.tolist()}
