"""Training over ranks: the weights of one rank, whatever each rank holds; faults stop all ranks alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.rank_processes import run_ranks, values_of
from helpers.small_model import SmallModel, random_preferences, response_items
from hypothesis import given
from hypothesis import strategies as st

from srcfast import distributed
from srcfast.config.settings import DPOConfig, LoRAConfig, TrainingConfig
from srcfast.data.batching import balance_by_tokens
from srcfast.errors import SrcfastError
from srcfast.stages.dpo import PairMeta, pair_denominator, preference_loss
from srcfast.stages.pair_trees import preference_trees
from srcfast.stages.rationale import rationale_loss, response_tokens
from srcfast.training import loop
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.training.items import Objective, TrainingItem
from srcfast.training.loop import train

# 13 items in batches of 6: the last batch has one item, fewer than any number of ranks.
SETTINGS = TrainingConfig(
    micro_batch_size=3,
    gradient_accumulation_steps=2,
    epochs=2,
    token_budget=120,
    learning_rate=0.003,
    weight_decay=0.1,
    max_grad_norm=0.5,
    activation_checkpointing=0,
).seeded(3)
SUMMED = ("tokens", "response_tokens")


def weights_of(model: SmallModel) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).tolist()


def train_responses(folder: Path) -> dict[str, Any]:
    model = SmallModel(lora=LoRAConfig(r=3, alpha=12.0))
    history = train(model, response_items(13), objective=Objective(rationale_loss, response_tokens), settings=SETTINGS)
    return {"weights": weights_of(model), "history": history}


def train_pairs_and_rehearsal(folder: Path) -> dict[str, Any]:
    model = SmallModel(lora=LoRAConfig(r=3, alpha=12.0))
    pairs = random_preferences(5)
    items = [
        TrainingItem(tree, PairMeta(pair.confidence, pair.confidence, -30.0, -35.0))
        for tree, pair in zip(preference_trees(model, pairs), pairs, strict=True)
    ]
    items += response_items(4)
    history = train(
        model,
        items,
        objective=Objective(preference_loss(DPOConfig(rehearsal_weight=0.5, sft_weight=0.0)), pair_denominator),
        settings=SETTINGS.replace(micro_batch_size=2, loader_workers=0),
    )
    return {"weights": weights_of(model), "history": history}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_the_weights_and_metrics_of_one(tmp_path: Path, ranks: int) -> None:
    alone = train_responses(tmp_path)
    together = values_of(run_ranks(ranks, train_responses, tmp_path))
    for one in together:
        assert one["weights"] == together[0]["weights"]  # bit for bit
        np.testing.assert_allclose(one["weights"], alone["weights"], rtol=1e-9, atol=1e-9)
        assert len(one["history"]) == len(alone["history"]) == 6
        for row, own in zip(one["history"], alone["history"], strict=True):
            assert [row[name] for name in SUMMED] == [own[name] for name in SUMMED]
            assert row["loss"] == pytest.approx(own["loss"], rel=1e-9)
            assert row["grad_norm"] == pytest.approx(own["grad_norm"], rel=1e-9)
            assert row["tokens"] + row["wasted_tokens"] == row["forests"] * SETTINGS.token_budget


def test_a_rank_without_pairs_or_without_anything_reports_the_metrics_of_all(tmp_path: Path) -> None:
    alone = train_pairs_and_rehearsal(tmp_path)
    for one in values_of(run_ranks(4, train_pairs_and_rehearsal, tmp_path)):
        np.testing.assert_allclose(one["weights"], alone["weights"], rtol=1e-9, atol=1e-9)
        for row, own in zip(one["history"], alone["history"], strict=True):
            same = row.keys() - {"tokens_per_second", "wasted_tokens", "forests", "mfu", "peak_memory_bytes"}
            assert row.keys() == own.keys()
            for name in same:
                assert row[name] == pytest.approx(own[name], rel=1e-9, abs=1e-12), name


def not_finite_on_one_rank(folder: Path) -> None:
    def broken(hidden, forest, head_weight, items, denominator):  # type: ignore[no-untyped-def]
        loss, metrics = rationale_loss(hidden, forest, head_weight, items, denominator)
        return (loss * math.nan if "sample-4" in [item.tree.key for item in items] else loss), metrics

    settings = SETTINGS.replace(micro_batch_size=1, gradient_accumulation_steps=13)
    train(SmallModel(), response_items(13), objective=Objective(broken, response_tokens), settings=settings)


def other_weights_on_one_rank(folder: Path) -> None:
    model = SmallModel(seed=distributed.rank())
    train(model, response_items(4), objective=Objective(rationale_loss, response_tokens), settings=SETTINGS)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_the_same_words(tmp_path: Path) -> None:
    found = run_ranks(2, not_finite_on_one_rank, tmp_path)
    assert [one["exit"] for one in found] == [1, 1]
    assert found[0]["error"] == found[1]["error"]
    assert "step 0: the loss is not finite" in found[0]["error"] and "samples sample-4;" in found[0]["error"]


def test_ranks_with_other_weights_are_refused_before_the_first_step(tmp_path: Path) -> None:
    for one in run_ranks(2, other_weights_on_one_rank, tmp_path):
        assert "the same weights on all ranks, found others on rank 1" in one["error"]


def train_with_workers_and_late_numbers(folder: Path) -> dict[str, Any]:
    loop.reads_late = lambda device: True  # as on a GPU; this process ends with the test
    model = SmallModel(lora=LoRAConfig(r=3, alpha=12.0))
    settings = SETTINGS.replace(loader_workers=2)
    history = train(model, response_items(13), objective=Objective(rationale_loss, response_tokens), settings=settings)
    return {"weights": weights_of(model), "history": history}


def test_worker_processes_and_numbers_read_late_change_nothing_on_ranks(tmp_path: Path) -> None:
    alone = train_responses(tmp_path)
    for one in values_of(run_ranks(2, train_with_workers_and_late_numbers, tmp_path)):
        np.testing.assert_allclose(one["weights"], alone["weights"], rtol=1e-9, atol=1e-9)
        assert [row["tokens"] for row in one["history"]] == [row["tokens"] for row in alone["history"]]


def train_on_from_a_checkpoint(folder: Path) -> dict[str, Any]:
    """Stops before the fourth update where none is saved; else goes on from what is."""
    saved = TrainingCheckpoints(folder / "checkpoint", {}, steps=1)
    first = not saved.directory.exists()
    distributed.barrier()
    stepped = []

    def stop(metrics: dict[str, Any]) -> None:
        if first and metrics["step"] == 3:
            raise SrcfastError("stopped here")

    model = SmallModel(lora=LoRAConfig(r=3, alpha=12.0))
    history = train(
        model,
        response_items(13),
        objective=Objective(rationale_loss, response_tokens),
        settings=SETTINGS,
        before_update=stop,
        on_step=lambda metrics: stepped.append(metrics["step"]),
        checkpoints=saved,
    )
    return {"weights": weights_of(model), "stepped": stepped, "steps": [row["step"] for row in history]}


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2)])
def test_a_training_that_was_stopped_goes_on_with_another_number_of_ranks(
    tmp_path: Path, before: int, after: int
) -> None:
    alone = train_responses(tmp_path)
    assert {one["error"] for one in run_ranks(before, train_on_from_a_checkpoint, tmp_path)} == {"stopped here"}
    for one in values_of(run_ranks(after, train_on_from_a_checkpoint, tmp_path)):
        assert one["stepped"] == [3, 4, 5] and one["steps"] == [0, 1, 2, 3, 4, 5]
        np.testing.assert_allclose(one["weights"], alone["weights"], rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 9))
def test_shares_hold_every_item_once_and_nearly_the_same_number_of_tokens(sizes: list[int], ranks: int) -> None:
    shares = balance_by_tokens(sizes, ranks)
    assert sorted(sum(shares, [])) == list(range(len(sizes)))
    assert len(shares) == ranks and all(share == sorted(share) for share in shares)
    tokens = [sum(sizes[place] for place in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(sizes, default=0)
    assert shares == balance_by_tokens(sizes, ranks)
