"""Training on a GPU: not waited for from the second step on, and the same as on a CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.small_model import SmallModel
from test_training import SETTINGS, preference_items, response_items

from srcfast.config.settings import DPOConfig, LoRAConfig
from srcfast.data.batching import global_batch
from srcfast.errors import SrcfastError
from srcfast.stages.dpo import pair_denominator, preference_loss
from srcfast.stages.pair_trees import pair_logit_rows
from srcfast.stages.rationale import rationale_loss, response_tokens
from srcfast.training.items import Objective, TrainingItem
from srcfast.training.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def model_on(device: str) -> SmallModel:
    return SmallModel(dtype=torch.float32, lora=LoRAConfig(r=3, alpha=12.0)).to(device)


def weights(model: SmallModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_is_waited_for_from_the_second_step_on(workers: int) -> None:
    model = model_on("cuda")
    items = preference_items(model, 20) + response_items(12)
    calls: list[int] = []

    def denominator(batch: list[TrainingItem]) -> Any:
        calls.append(len(batch))
        # The first steps also load libraries and compile kernels.
        torch.cuda.set_sync_debug_mode("error" if len(calls) > 2 else "default")
        return pair_denominator(batch)

    try:
        history = train(
            model,
            items,
            objective=Objective(
                preference_loss(DPOConfig(sft_weight=0.3, rehearsal_weight=0.5)), denominator, pair_logit_rows
            ),
            settings=SETTINGS.replace(loader_workers=workers),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(history) == len(calls) == 4
    assert all(row["peak_memory_bytes"] > 0 for row in history)


def test_a_gpu_s_training_is_a_cpu_s() -> None:
    trained = {}
    for device in ("cpu", "cuda"):
        model = model_on(device)
        history = train(
            model, response_items(40), objective=Objective(rationale_loss, response_tokens), settings=SETTINGS
        )
        trained[device] = (weights(model), [row["loss"] for row in history])
    # fp32 sums in another order, enlarged where AdamW divides by small gradients.
    torch.testing.assert_close(trained["cuda"][0], trained["cpu"][0], rtol=1e-3, atol=1e-3)
    assert trained["cuda"][1] == pytest.approx(trained["cpu"][1], rel=1e-4)


@pytest.mark.parametrize("step", [0, 2])
def test_what_is_not_finite_changes_no_weight(step: int) -> None:
    items = response_items(40)
    bad = items[global_batch(40, step, SETTINGS)[0]].tree.key
    model, kept = model_on("cuda"), []

    def broken(hidden: Any, forest: Any, head_weight: Any, inside: Any, denominator: Any) -> Any:
        kept.append(weights(model))
        loss, metrics = rationale_loss(hidden, forest, head_weight, inside, denominator)
        return (loss * math.nan if bad in [item.tree.key for item in inside] else loss), metrics

    with pytest.raises(SrcfastError, match=f"step {step}: the loss is not finite.*{bad}"):
        train(model, items, objective=Objective(broken, response_tokens), settings=SETTINGS)
    assert torch.equal(weights(model), kept[step])
