"""Whole trainings by settings in combination, against one in plain PyTorch: losses, norms, rates, and the weights at the end."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.plain_training import (
    LOOP,
    STEADY,
    adapted,
    check_training,
    name_of,
    pairwise_cases,
    plain_training,
    raps,
    rationale_losses,
)

from srcfast.config.settings import TrainingConfig
from srcfast.stages.rationale import rationale_loss, rationale_trees, response_tokens
from srcfast.training import loop
from srcfast.training.items import Objective
from srcfast.training.loop import train


@pytest.mark.parametrize("case", pairwise_cases(LOOP, seed=2), ids=name_of)
def test_rationale_training_is_the_plain_one(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = dict(case)
    late = case.pop("late")
    monkeypatch.setattr(loop, "reads_late", lambda device: late)
    settings = TrainingConfig(**STEADY, **case).seeded(6)
    model, plain, rows = adapted(1), adapted(1), raps(10, seed=8)
    objective = Objective(rationale_loss, response_tokens)
    history = train(model, rationale_trees(model, rows), objective=objective, settings=settings)
    expected = plain_training(plain, len(rows), settings, rationale_losses(plain, rows))
    check_training(model, plain, history, expected)


def test_each_two_values_of_two_settings_meet_in_a_case() -> None:
    cases = pairwise_cases({"a": (1, 2, 3), "b": (True, False), "c": ("x", "y")}, seed=0)
    assert {(case["a"], case["b"]) for case in cases} == {(a, b) for a in (1, 2, 3) for b in (True, False)}
    assert {(case["b"], case["c"]) for case in cases} == {(b, c) for b in (True, False) for c in ("x", "y")}
    assert len(cases) < 12
