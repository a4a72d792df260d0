"""The loop: splits change nothing, order is a function of the seed, faults stop it before the update."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_model import (
    END,
    IMAGE,
    TOKENS_PER_IMAGE,
    SmallModel,
    image_embedding,
    letters,
    random_text,
)

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import InputError, SrcfastError
from srcfast.models.lora import LoRAConfig
from srcfast.runtime.training import (
    TrainingItem,
    TrainingSettings,
    global_batch,
    num_steps,
    train,
)
from srcfast.stages.rationale import rationale_loss, response_tokens

SETTINGS = TrainingSettings(
    micro_batch_size=8, token_budget=4096, learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.5, seed=3
)


def response_items(count: int, images: bool = False) -> list[TrainingItem]:
    rng = np.random.default_rng(7)
    items = []
    for number in range(count):
        picture = [IMAGE] * TOKENS_PER_IMAGE if images else []
        prompt = Segment(np.array([*picture, *letters(random_text(rng, 24))]))
        response = Segment(np.array([*letters(random_text(rng, 17)), END]), 0)
        keys = (f"image-{number % 3}",) if images else ()
        items.append(TrainingItem(Tree((prompt, response), keys, key=f"sample-{number}")))
    return items


def trained_weights(settings: TrainingSettings, dtype: torch.dtype) -> tuple[torch.Tensor, list[dict]]:
    model = SmallModel(dtype=dtype, lora=LoRAConfig(r=3, alpha=12.0))
    history = train(model, response_items(24), loss=rationale_loss, denominator=response_tokens, settings=settings)
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]), history


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_three_steps_are_the_same_however_a_global_batch_is_split(dtype: torch.dtype, tolerance: float) -> None:
    whole, history = trained_weights(SETTINGS, dtype)
    assert [row["forests"] for row in history] == [1, 1, 1]
    for change in (
        {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
        {"micro_batch_size": 2, "gradient_accumulation_steps": 4},
        {"token_budget": 45},
    ):
        split, split_history = trained_weights(replace(SETTINGS, **change), dtype)
        assert min(row["forests"] for row in split_history) > 1
        # Sums in another order; AdamW divides by the gradient's size, which enlarges their rounding.
        torch.testing.assert_close(split, whole, rtol=tolerance, atol=tolerance)
        for row, split_row in zip(history, split_history, strict=True):
            assert split_row["loss"] == pytest.approx(row["loss"], rel=tolerance)
            assert split_row["response_tokens"] == row["response_tokens"]


def test_the_loss_is_the_mean_over_the_batch_s_response_tokens_and_falls() -> None:
    items = response_items(8)
    model = SmallModel()
    forest = Forest.of([item.tree for item in items])
    with torch.no_grad():
        logps = (model(forest) @ model.decoder.head_weight.T).log_softmax(-1)
    losses = []
    for tree, item in enumerate(items):
        start, tokens = forest.segment_start[tree][1], item.tree.segments[1].tokens
        losses += [-float(logps[start - 1 + i, token]) for i, token in enumerate(tokens)]
    settings = replace(SETTINGS, epochs=12, warmup_ratio=0.0, learning_rate=1e-2)
    history = train(model, items, loss=rationale_loss, denominator=response_tokens, settings=settings)
    assert history[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-9)
    assert history[0]["response_tokens"] == len(losses)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[0]["tokens"] + history[0]["wasted_tokens"] == SETTINGS.token_budget


def test_the_order_is_a_function_of_seed_and_epoch_and_covers_every_item() -> None:
    settings = TrainingSettings(micro_batch_size=3, gradient_accumulation_steps=2, epochs=2, seed=5)
    assert num_steps(13, settings) == 6
    batches = [global_batch(13, step, settings) for step in range(6)]
    assert [len(batch) for batch in batches] == [6, 6, 1, 6, 6, 1]
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(13))
    assert first != second
    assert batches == [global_batch(13, step, settings) for step in range(6)]
    assert first != sum((global_batch(13, step, replace(settings, seed=6)) for step in range(3)), [])


def test_each_distinct_image_is_asked_for_once_a_step() -> None:
    asked = []

    def features(keys: list[str]) -> dict[str, torch.Tensor]:
        asked.append(list(keys))
        return {key: image_embedding(key) for key in keys}

    settings = replace(SETTINGS, micro_batch_size=2, gradient_accumulation_steps=4)
    items = response_items(16, images=True)
    train(
        SmallModel(),
        items,
        loss=rationale_loss,
        denominator=response_tokens,
        settings=settings,
        features=features,
    )
    assert [sorted(keys) for keys in asked] == [["image-0", "image-1", "image-2"]] * 2


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update_and_is_named(where: str) -> None:
    def broken(hidden, forest, head_weight, items, denominator):
        loss, metrics = rationale_loss(hidden, forest, head_weight, items, denominator)
        if "sample-4" in [item.tree.key for item in items]:
            # sqrt has an infinite slope at 0: the loss stays finite, its gradient doesn't.
            loss = loss * math.nan if where == "loss" else loss + (hidden - hidden.detach()).abs().sum().sqrt()
        return loss, metrics

    model = SmallModel()
    before = [p.detach().clone() for p in model.parameters()]
    settings = replace(SETTINGS, micro_batch_size=1, gradient_accumulation_steps=8)
    with pytest.raises(SrcfastError, match=f"step 0: the {where} is not finite.*sample-4"):
        train(model, response_items(8), loss=broken, denominator=response_tokens, settings=settings)
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_only_what_requires_gradients_is_trained() -> None:
    model = SmallModel()
    head = model.decoder.head_weight.detach().clone()
    query = model.decoder.layers[0].self_attn.q_proj.weight.detach().clone()
    train(model, response_items(8), loss=rationale_loss, denominator=response_tokens, settings=SETTINGS)
    assert torch.equal(model.decoder.head_weight, head)
    assert not torch.equal(model.decoder.layers[0].self_attn.q_proj.weight, query)


def test_nothing_to_train_on_and_items_that_do_not_fit_are_refused_first() -> None:
    model, stepped = SmallModel(), []
    with pytest.raises(SrcfastError, match="nothing to train on"):
        train(model, [], loss=rationale_loss, denominator=response_tokens, settings=SETTINGS)
    large = TrainingItem(Tree((Segment(np.zeros(99)), Segment(np.zeros(2), 0)), key="the-large-one"))
    with pytest.raises(InputError, match="the-large-one.*found 101"):
        train(
            model,
            [*response_items(40), large],
            loss=rationale_loss,
            denominator=response_tokens,
            settings=replace(SETTINGS, token_budget=100),
            on_step=stepped.append,
        )
    assert not stepped
