"""A rank whose share holds no image takes part in the same exchanges as the others: no rank waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.rank_processes import run_ranks, values_of
from helpers.small_lvlm import load_image, write_small_lvlm

from srcfast import distributed
from srcfast.config.settings import LoRAConfig, TrainingConfig
from srcfast.data.forest import Segment, Tree
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.stages.rationale import rationale_loss, response_logit_rows, response_tokens
from srcfast.training.items import Objective, TrainingItem
from srcfast.training.loop import train

SETTINGS = TrainingConfig(
    epochs=3,
    micro_batch_size=4,
    token_budget=200,
    learning_rate=0.003,
    gradient_accumulation_steps=1,
    activation_checkpointing=0,
).seeded(1)


def items_of(model: Any) -> list[TrainingItem]:
    """8 of text alone and one with an image: in most global batches no rank, in the others one, has an image."""
    made = []
    for number in range(9):
        images = ("image-1",) if number == 4 else ()
        prompt = model.encode_prompt("Why?" * (1 + number % 3), [load_image(key) for key in images])
        response = model.encode_response("It is red. " * (1 + number % 2))
        made.append(TrainingItem(Tree((Segment(prompt), Segment(response, 0)), images, key=f"sample-{number}")))
    return made


def train_mixed(folder: Path) -> dict[str, Any]:
    model = load_lvlm(folder / "lvlm", dtype=torch.float64, lora=LoRAConfig(r=2, alpha=8.0))
    encode, seen = ImageFeatures(model, load_image), list[int]()

    def features(keys: Any, *prepared: Any) -> Any:
        seen.append(len(list(keys)))
        return encode(keys, *prepared)

    history = train(
        model,
        items_of(model),
        objective=Objective(rationale_loss, response_tokens, response_logit_rows),
        settings=SETTINGS,
        features=features,
    )
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return {"weights": weights.tolist(), "losses": [row["loss"] for row in history], "images": seen}


def test_ranks_of_which_some_have_no_image_train_as_one_does(tmp_path: Path) -> None:
    write_small_lvlm(tmp_path / "lvlm")
    assert distributed.world_size() == 1
    alone = train_mixed(tmp_path)
    together = values_of(run_ranks(3, train_mixed, tmp_path))
    seen = [sum(one["images"]) for one in together]
    assert min(seen) == 0 and sum(seen) == SETTINGS.epochs, "one rank has the image, and another never has one"
    for one in together:
        # fp64, and sums in another order; AdamW enlarges their rounding where gradients are small
        np.testing.assert_allclose(one["losses"], alone["losses"], rtol=1e-9)
        np.testing.assert_allclose(one["weights"], alone["weights"], rtol=1e-6, atol=1e-9)
