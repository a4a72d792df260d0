"""With dropout, too, any number of ranks gives the adapter of one; a step of several ranks is run again on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.rank_processes import run_ranks, values_of
from helpers.small_model import SmallModel, response_items

from srcfast import distributed
from srcfast.config.settings import LoRAConfig, TrainingConfig
from srcfast.data.batching import global_batch
from srcfast.errors import SrcfastError
from srcfast.stages.rationale import rationale_loss, response_tokens
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.training.items import Objective
from srcfast.training.loop import rerun_step, train

# 13 items in batches of 6: the last batch has one item, fewer than any number of ranks.
SETTINGS = TrainingConfig(
    micro_batch_size=3,
    gradient_accumulation_steps=2,
    epochs=2,
    token_budget=120,
    learning_rate=0.003,
    activation_checkpointing=0,
).seeded(3)
STOPPED = 3  # the update before which a training is stopped


def adapter_of(model: SmallModel) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).tolist()


def new_model() -> SmallModel:
    return SmallModel(lora=LoRAConfig(r=3, alpha=12.0, dropout=0.1))


def train_with_dropout(folder: Path) -> dict[str, Any]:
    model = new_model()
    history = train(model, response_items(13), objective=Objective(rationale_loss, response_tokens), settings=SETTINGS)
    return {"adapter": adapter_of(model), "losses": [row["loss"] for row in history]}


@pytest.mark.parametrize("ranks", [2, 4])
def test_with_dropout_ranks_give_the_adapter_of_one(tmp_path: Path, ranks: int) -> None:
    alone = train_with_dropout(tmp_path)
    for one in values_of(run_ranks(ranks, train_with_dropout, tmp_path)):
        # fp64 sums in another order
        np.testing.assert_allclose(one["adapter"], alone["adapter"], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(one["losses"], alone["losses"], rtol=1e-9)


def train_on_with_dropout(folder: Path) -> dict[str, Any]:
    """Stops before an update where none is saved, and tells of it; else goes on from what is."""
    saved = TrainingCheckpoints(folder / "checkpoint", {}, steps=1)
    first = not saved.directory.exists()
    distributed.barrier()
    told: dict[str, Any] = {}

    def stop(metrics: dict[str, Any]) -> None:
        if first and metrics["step"] == STOPPED:
            told.update({name: metrics[name] for name in ("loss", "grad_norm")})
            raise SrcfastError("stopped here")

    model = new_model()
    try:
        train(
            model,
            response_items(13),
            objective=Objective(rationale_loss, response_tokens),
            settings=SETTINGS,
            before_update=stop,
            checkpoints=saved,
        )
    except SrcfastError as error:
        assert str(error) == "stopped here"
    return {"adapter": adapter_of(model)} | told


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (4, 2)])
def test_stopped_with_dropout_a_training_goes_on_with_other_ranks_and_its_step_is_run_again_on_one(
    tmp_path: Path, before: int, after: int
) -> None:
    stopped = values_of(run_ranks(before, train_on_with_dropout, tmp_path))[0]
    model, items = new_model(), response_items(13)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.nn.utils.vector_to_parameters(torch.tensor(stopped["adapter"], dtype=torch.float64), trainable)
    batch = [items[index] for index in global_batch(len(items), STOPPED, SETTINGS)]
    again = rerun_step(model, batch, STOPPED, objective=Objective(rationale_loss, response_tokens), settings=SETTINGS)
    assert again["loss"] == pytest.approx(stopped["loss"], rel=1e-9)
    assert again["grad_norm"] == pytest.approx(stopped["grad_norm"], rel=1e-9)
    alone = train_with_dropout(tmp_path)
    for one in values_of(run_ranks(after, train_on_with_dropout, tmp_path)):
        np.testing.assert_allclose(one["adapter"], alone["adapter"], rtol=1e-9, atol=1e-9)
