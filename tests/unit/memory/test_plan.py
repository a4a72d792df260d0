"""The plan of a run by literal numbers: typical trees, the largest forest, limits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from srcfast.config.settings import Config, TrainingConfig
from srcfast.data.forest import Forest
from srcfast.memory import plan
from srcfast.memory.activations import ForestSizes
from srcfast.memory.advice import _options, largest_value
from srcfast.memory.model_sizes import nf4_scale_bytes
from srcfast.memory.plan import Lengths, device_memory, forecast_stage, largest_forest, policy_sizes, typical_tree


def config(**sections: Any) -> Config:
    return Config(**sections)


def shape(tree: Any) -> list[tuple[int, int]]:
    return [(segment.tokens.size, segment.parent) for segment in tree.segments]


def test_a_judged_tree_has_each_candidate_against_all_others_and_against_none() -> None:
    settings = config(candidates={"num_candidates": 3})
    pairwise = typical_tree(settings, "scores", Lengths(text=10, response=7))
    assert shape(pairwise) == [
        (20, -1),
        *[(7, 0), (7, 1), (7, 1), (7, 1)],
        *[(7, 0), (7, 5), (7, 5), (7, 5)],
        *[(7, 0), (7, 9), (7, 9), (7, 9)],
    ]
    alone = typical_tree(settings.replace(scorer={"mode": "independent"}), "scores", Lengths(text=10, response=7))
    assert shape(alone) == [(20, -1), (7, 0), (7, 1), (7, 0), (7, 3), (7, 0), (7, 5)]


def test_plain_samples_are_judged_too_and_finalists_alone_against_each_other() -> None:
    settings = config(candidates={"num_candidates": 2, "plain_samples": 1}, scorer={"finalists": 1})
    tree = typical_tree(settings, "scores", Lengths(text=10, response=7))
    assert shape(tree) == [(20, -1), *[(7, 0), (7, 1), (7, 1)], *[(7, 0), (7, 4), (7, 4)], (7, 0), (7, 7)]


def test_comparisons_that_exceed_the_budget_are_forecast_in_trees_that_fit() -> None:
    few, many = (config(candidates={"num_candidates": 8, "plain_samples": plain}) for plain in (0, 56))
    budget = few.scorer.token_budget
    assert (
        typical_tree(few, "scores", Lengths()).num_tokens < budget < typical_tree(many, "scores", Lengths()).num_tokens
    )
    forecasts = [forecast_stage(one, "scores", memory=1e12) for one in (few, many)]
    assert forecasts[1].peak < 1.5 * forecasts[0].peak


@pytest.mark.parametrize(
    ("stage", "leaves"),
    [("rationale", 1), ("preferences", 2), ("dpo", 2), ("candidates", 0), ("evaluation", 0)],
)
def test_a_policy_s_tree_is_a_prompt_with_its_image_and_its_responses(stage: str, leaves: int) -> None:
    vision = policy_sizes(Config()).vision
    assert vision is not None and vision.image_tokens > 0
    tree = typical_tree(Config(), stage, Lengths(text=10, response=7))
    assert shape(tree) == [(10 + vision.image_tokens, -1), *[(7, 0)] * leaves]


def test_the_largest_forest_of_a_run_is_the_one_with_most_tokens() -> None:
    loop = TrainingConfig(micro_batch_size=2, gradient_accumulation_steps=2, token_budget=100).seeded(3)
    sizes = [10, 90, 45, 55, 30, 20]
    members = largest_forest(sizes, loop)
    assert sum(sizes[index] for index in members) <= 100 and len(members) <= 2
    totals = []
    for step in range(2):
        batch = plan.global_batch(6, step, loop)
        ordered = sorted(batch, key=lambda index: -sizes[index])
        for first in range(len(ordered)):
            for second in range(first + 1, len(ordered)):
                total = sizes[ordered[first]] + sizes[ordered[second]]
                totals += [total] if total <= 100 else []
    assert 80 <= sum(sizes[index] for index in members) <= max(max(totals), 90)


def test_a_limit_counts_up_to_what_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "memory_of", lambda device: 1000)
    assert device_memory(config(memory="400")) == 400.0
    assert device_memory(config(memory="4000")) == 1000.0
    assert device_memory(config()) == 1000.0


def test_a_gpu_that_is_not_here_has_what_the_settings_say() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert device_memory(config(model={"device": "cuda"})) == math.inf
    assert device_memory(config(model={"device": "cuda"}, memory="12 GB")) == 12e9


@pytest.mark.parametrize(
    ("count", "scales"),
    [(1, 1 + 4 + 4), (64, 1 + 4 + 4), (65, 2 + 4 + 4), (64 * 256, 256 + 4 + 4), (64 * 256 + 1, 257 + 8 + 4)],
)
def test_scales_of_4_bit_weights_are_counted_to_the_byte(count: int, scales: int) -> None:
    assert nf4_scale_bytes(count) == scales


@pytest.mark.parametrize("stage", ["rationale", "dpo"])
def test_a_training_s_forest_has_a_micro_batch_within_the_budget(stage: str) -> None:
    tree = typical_tree(Config(), stage, Lengths()).num_tokens
    section = {"micro_batch_size": 3, "token_budget": 100 * tree}
    few = forecast_stage(config(**{stage: section}), stage)
    more = forecast_stage(config(**{stage: section | {"micro_batch_size": 6}}), stage)
    bound = forecast_stage(config(**{stage: section | {"micro_batch_size": 6, "token_budget": 3 * tree + 1}}), stage)
    assert few.activations == pytest.approx(bound.activations) and more.activations > 1.8 * few.activations


def test_the_advised_ranks_halve_down_to_4() -> None:
    ranks = [value for name, value in _options(config(lora={"r": 32, "alpha": 1.0}), "dpo") if name == "lora.r"]
    assert ranks == [16, 8]
    assert not [name for name, _ in _options(config(lora={"r": 8, "alpha": 1.0}), "dpo") if name == "lora.r"]


def test_no_more_beams_are_advised_than_the_settings_allow() -> None:
    assert largest_value(Config(), "candidates.num_beams", "candidates", memory=1e18) == 256


@pytest.mark.parametrize("stage", ["rationale", "preferences", "dpo"])
def test_a_token_budget_is_filled_by_parts_of_trees(stage: str) -> None:
    config = Config(rationale={"activation_checkpointing": 0}, dpo={"activation_checkpointing": 0})
    tree = typical_tree(config, stage, Lengths())
    forest = ForestSizes.of(Forest.of([tree]), "cpu").times(2.5)
    budget = round(2.5 * tree.num_tokens)
    assert budget == 2.5 * tree.num_tokens
    assert forecast_stage(config, stage, memory=1e12, token_budget=budget) == forecast_stage(
        config, stage, memory=1e12, forest=forest
    )


def test_where_nothing_fits_the_largest_batch_is_one() -> None:
    for setting in ("candidates.batch_size", "candidates.num_beams"):
        assert largest_value(Config(), setting, "candidates", memory=1.0) == 1
