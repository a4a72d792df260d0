"""Choose the comparisons that decide which candidate is best and which worst, without the whole tournament.

Two rounds. The first rates each candidate alone: a few tokens after the candidate, which the tournament's tree has in any
case. Candidates whose rating is within a margin of the highest may be the best, those near the lowest the worst; the
nearest few of each are the contenders. The second round compares the contenders with each other in both orders; the other
candidates are not compared (score 1/2, confidence 0). Where that leaves the best uncertain, a third round may compare twice as
many. Each round runs the tree again, so the saving is counted in tokens. A share of the samples is compared in full as well,
to measure what the rounds miss.

`scorer.finalists` sets the number of contenders on each side, however far their ratings are apart. Those that may be best are
then chosen by log rating + `scorer.likelihood_weight` log pi, the policy's likelihood being the prior, as curation chooses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from srcfast.config.settings import ScorerConfig

SAME_SCORE = 1e-6  # candidates whose full scores are this near are equally good
SMALLEST_SCORE = 1e-6  # of which a logarithm is taken


@dataclass
class AdaptivePairs:
    """Settings (`scorer.adaptive_*`, `scorer.finalists`), and counts of the comparisons."""

    settings: ScorerConfig
    counts: Counter[str] = field(default_factory=Counter, repr=False)

    @classmethod
    def of(cls, settings: ScorerConfig) -> AdaptivePairs | None:
        """Make one from the settings; None where they say to compare all pairs."""
        return cls(settings) if settings.pairs == "adaptive" or settings.finalists else None

    @property
    def contenders(self) -> int:
        """Maximum number of candidates that may be best, and of those that may be worst."""
        return self.settings.finalists or self.settings.adaptive_contenders

    @property
    def margin(self) -> float:
        """How far a contender's rating may be from the highest (lowest)."""
        return math.inf if self.settings.finalists else self.settings.adaptive_margin

    def is_audited(self, sample_id: str) -> bool:
        """Return whether the sample is compared in full as well; the id alone decides, whatever the other samples are."""
        return Random(f"audit/{sample_id}").random() < self.settings.adaptive_audit

    def is_short(self, num_candidates: int) -> bool:
        """Return whether two rounds have fewer pairs than the tournament; if not, the tournament is run at once."""
        return num_candidates > 2 * self.contenders

    def pairs(
        self, ratings: np.ndarray, wider: bool = False, logprobs: np.ndarray | None = None
    ) -> list[tuple[int, int]]:
        """Return the ordered pairs of the second round; the index breaks ties.

        Args:
            ratings: of each candidate alone, [n].
            wider: return those of the second and the third round: twice as many contenders, whatever the margin.
            logprobs: of the candidates, in nats, [n]; for `scorer.likelihood_weight` alone.
        """
        margin, count = self.margin, self.contenders
        if wider:
            margin, count = 1.0, 2 * count
        order = np.argsort(-ratings, kind="stable").tolist()
        by_merit = order
        if (weight := self.settings.likelihood_weight) and logprobs is not None:
            merits = np.log(np.maximum(ratings, SMALLEST_SCORE)) + weight * logprobs
            by_merit = np.argsort(-merits, kind="stable").tolist()
        best = [i for i in by_merit if ratings[i] >= ratings[order[0]] - margin][:count]
        others = [i for i in order[::-1] if i not in best]
        worst = [i for i in others if ratings[i] <= ratings[order[-1]] + margin][:count]
        chosen = sorted({*best, *worst})
        return [(i, j) for i in chosen for j in chosen if i != j]

    def is_uncertain(self, scores: np.ndarray, confidence: np.ndarray, pairs: Sequence[tuple[int, int]]) -> bool:
        """Return whether the confidence [n, n] between the two best of the compared candidates, by score [n], is too low."""
        compared = sorted({i for i, _ in pairs}, key=lambda i: (-scores[i], i))
        return bool(confidence[compared[0], compared[1]] < self.settings.adaptive_confidence)

    def count(self, pairs: int, all_pairs: int, tokens: int, all_tokens: int) -> None:
        """Count a sample's pairs and tokens, and those of its tournament; the audit's are left out."""
        self.counts.update(samples=1, pairs=pairs, all_pairs=all_pairs, tokens=tokens, all_tokens=all_tokens)

    def compare(self, short: np.ndarray, full: np.ndarray) -> None:
        """Count how far an audited sample's scores [n] by the chosen pairs agree with those by all pairs."""
        best, worst = int(short.argmax()), int(short.argmin())
        lost = (full.max() - full[best], full[worst] - full.min())  # by the tournament's scores, 0 where both agree
        same = [bool(value <= SAME_SCORE) for value in lost]
        self.counts.update(audited=1, same_best=same[0], same_worst=same[1], same_pair=all(same))
        self.counts["best_shortfall"] += float(lost[0])  # type: ignore[assignment]
        self.counts["worst_shortfall"] += float(lost[1])  # type: ignore[assignment]

    def report(self) -> dict[str, Any]:
        """Return the shares of the tournament that were run, and the agreement on audited samples, None where there are none.

        `widened`: share of samples in which twice as many contenders were compared.
        `same_best`, `same_worst`, `same_pair`: shares of audited samples in which the tournament scores the same candidate
        best, worst, or both; `best_shortfall`, `worst_shortfall`: how much worse (better), by the tournament's scores, the
        chosen best (worst) is than the tournament's, on average.
        """
        counts = self.counts
        result: dict[str, Any] = {
            "samples": counts["samples"],
            "pairs_share": counts["pairs"] / counts["all_pairs"] if counts["all_pairs"] else None,
            "tokens_share": counts["tokens"] / counts["all_tokens"] if counts["all_tokens"] else None,
            "audited": counts["audited"],
        }
        if self.settings.adaptive_confidence:
            result["widened"] = counts["widened"] / counts["samples"] if counts["samples"] else None
        names = ("same_best", "same_worst", "same_pair", "best_shortfall", "worst_shortfall")
        return result | {name: counts[name] / counts["audited"] if counts["audited"] else None for name in names}


def ordered(pairs: Sequence[tuple[int, int]], first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return which of the comparisons (first [M], second [M]) are among the pairs: [M] bool."""
    members = set(pairs)
    return np.array([pair in members for pair in zip(first.tolist(), second.tolist(), strict=True)], dtype=bool)
