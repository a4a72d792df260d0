"""Preference training by settings in combination against one in plain PyTorch: losses, norms, rates, weights at the end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.plain_training import (
    LOOP,
    STEADY,
    adapted,
    check_training,
    name_of,
    pairwise_cases,
    plain_training,
    preference_losses,
    raps,
    response_logprob,
    sentence_logprob,
)
from helpers.small_model import SmallModel, random_preferences

from srcfast.config.settings import DPOConfig
from srcfast.data.records import Preference
from srcfast.stages.dpo import train_preference
from srcfast.training import loop

PREFERENCE = LOOP | {
    "weighted": (True, False),
    "loss": (("sigmoid", 0.0), ("sigmoid", 0.15), ("sigmoid", "confidence"), ("ipo", 0.0), ("hinge", 0.0)),
    "beta": (0.1, 0.7),
    "credit": ("response", "sentence"),
    # Of the preference loss, the quality loss and the likelihood.
    "weights": ((1.0, 0.0, 0.0), (1.0, 0.0, 0.6), (0.0, 0.0, 0.6), (0.3, 0.5, 0.6), (0.0, 0.5, 0.0)),
    "rehearsal": (0, 4),
}


def random_sentences(rng: np.random.Generator, most: int) -> str:
    """Words of at least two letters, each a sentence; at times the last has no full stop."""
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 5))) for _ in range(rng.integers(1, most))]
    return ".".join(words) + "." * int(rng.integers(2))


def pairs_of(model: SmallModel, count: int, seed: int, credit: str) -> list[Preference]:
    """Pairs with the model's own log-probabilities as reference, and the R-Scorer's confidence beside the weight."""
    rng = np.random.default_rng(seed)
    made = []
    with torch.no_grad():
        for number, pair in enumerate(random_preferences(count, seed)):
            if credit == "sentence":  # every other one begins alike, within a sentence or with whole ones
                both = random_sentences(rng, 4) if number % 2 else ""
                pair = replace(pair, chosen=both + random_sentences(rng, 4), rejected=both + random_sentences(rng, 4))
            chosen, rejected = (response_logprob(model, pair.prompt, t)[0].item() for t in (pair.chosen, pair.rejected))
            extra = {"judge_confidence": float(rng.uniform(0.1, 1.0)), "reference_hash": "abc"}
            pair = replace(pair, reference_chosen_logprob=chosen, reference_rejected_logprob=rejected, extra=extra)
            if credit == "sentence":
                pair = replace(
                    pair,
                    credit="sentence",
                    reference_chosen_span_logprob=sentence_logprob(
                        model, pair.prompt, pair.chosen, pair.rejected
                    ).item(),
                    reference_rejected_span_logprob=sentence_logprob(
                        model, pair.prompt, pair.rejected, pair.chosen
                    ).item(),
                )
            made.append(pair)
    return made


@pytest.mark.parametrize("case", pairwise_cases(PREFERENCE, seed=1), ids=name_of)
def test_preference_training_is_the_plain_one(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = dict(case)
    late, weighted, rehearsal = (case.pop(name) for name in ("late", "weighted", "rehearsal"))
    loss_type, label_smoothing = case.pop("loss")
    preference_weight, quality_weight, sft_weight = case.pop("weights")
    monkeypatch.setattr(loop, "reads_late", lambda device: late)
    settings = DPOConfig(
        **STEADY,
        **case,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        preference_weight=preference_weight,
        quality_weight=quality_weight,
        sft_weight=sft_weight,
        rehearsal_weight=0.8 if rehearsal else 0.0,
    ).seeded(5)
    model, plain = adapted(2), adapted(2)
    pairs, rehearsed = pairs_of(plain, 7, seed=3, credit=settings.credit), raps(rehearsal, seed=4)
    history = train_preference(
        model,
        pairs,
        settings,
        weighting="confidence" if weighted else "none",
        expected_reference_hash="abc",
        rehearsal=rehearsed,
    )
    losses = preference_losses(plain, pairs, rehearsed, settings, weighted)
    expected = plain_training(plain, len(pairs) + len(rehearsed), settings, losses)
    check_training(model, plain, history, expected)
