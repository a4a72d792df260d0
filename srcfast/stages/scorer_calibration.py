"""Calibrate a trained R-Scorer on held-out examples of each quality of reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from srcfast.models.head import check_numbers
from srcfast.models.scorer import ALONE, Scorer, slot_hidden
from srcfast.models.verdict_temperature import fit_temperature, reliability, softmax
from srcfast.stages.scorer_training import ScorerExample, judge_tree_of, target_verdict


def calibrate_confidence(
    scorer: Scorer, examples: Mapping[str, Sequence[ScorerExample]], token_budget: int
) -> dict[str, dict[str, Any]]:
    """Fit a temperature for each quality; the scorer itself is not changed.

    Args:
        scorer: trained.
        examples: held-out ones by quality, at least one of each.
        token_budget: maximum of tokens in one forward pass.

    Returns:
        What `calibration.json` holds, by quality: temperature, fitted on all ordered pairs; verdict, the form; ece_before and
        ece_after, the expected calibration error of the likeliest verdicts; pairs; reliability, after, see `reliability`.
        "After" is measured on each half of the examples with the temperature that the other half gives.
    """
    return {quality: _calibrate(scorer, of_quality, token_budget) for quality, of_quality in examples.items()}


def _calibrate(scorer: Scorer, examples: Sequence[ScorerExample], token_budget: int) -> dict[str, Any]:
    logits, targets, example = pair_logits(scorer, examples, token_budget)
    right = logits.argmax(-1) == targets  # [n]
    confidence = np.empty(len(targets))
    for half in (example % 2 == 0, example % 2 == 1):
        others = ~half if half.any() and not half.all() else np.ones_like(half)  # of a single example its own pairs
        if half.any():
            confidence[half] = softmax(logits[half], fit_temperature(logits[others], targets[others])).max(-1)
    after, table = reliability(confidence, right)
    return {
        "temperature": fit_temperature(logits, targets),
        "verdict": scorer.verdict_form,
        "ece_before": reliability(softmax(logits).max(-1), right)[0],
        "ece_after": after,
        "pairs": len(targets),
        "reliability": table,
    }


@torch.no_grad()
def pair_logits(
    scorer: Scorer, examples: Sequence[ScorerExample], token_budget: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the verdict logits [n, K] of the examples' ordered pairs, their right verdicts [n] and examples [n]."""
    scorer.eval()
    trees = [judge_tree_of(scorer, example) for example in examples]
    logits = scorer.verdict_logits(slot_hidden(scorer, trees, token_budget)[0]).cpu().double().numpy()  # [M, K]
    check_numbers(scorer.text_model, logits.sum(-1), [t.tree.key for t in trees for _ in t.slots], "verdicts")
    verdicts = len(scorer.verdict_values)
    rows = [
        (target_verdict(example, first, second, verdicts), number, second != ALONE)
        for number, (tree, example) in enumerate(zip(trees, examples, strict=True))
        for first, second in zip(tree.first.tolist(), tree.second.tolist(), strict=True)
    ]
    targets, numbers, pairs = np.array(rows).T  # [M] each
    compared = pairs.astype(bool)
    return logits[compared], targets[compared], numbers[compared]
