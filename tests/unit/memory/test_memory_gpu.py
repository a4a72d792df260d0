"""What a GPU's memory is planned with: not with what others than the model have, nor with what dead cycles had."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import simulated_cuda
import torch
from helpers.small_training import SmallModel, random_trees

from srcfast.config.settings import LoRAConfig, TrainingConfig
from srcfast.memory.activations import ForestSizes
from srcfast.memory.forecast import Forecast, forecast_training, fullest_sizes, plan_checkpointing
from srcfast.memory.measure import measured
from srcfast.memory.model_sizes import ModelSizes, memory_for, memory_of, release_unused
from srcfast.training.optimizer import AdamW

MIB = 1 << 20
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "head_dim": 64}


@pytest.fixture(autouse=True)
def _nothing_else_in_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def on_device(quantize: bool = False) -> tuple[SmallModel, AdamW]:
    model = SmallModel(SHAPE, LoRAConfig(r=4, alpha=32.0), torch.bfloat16, quantize).cuda().train()
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    release_unused("cuda")
    return model, optimizer


@pytest.mark.parametrize("quantize", [False, True], ids=["bf16", "nf4"])
def test_what_others_have_is_not_planned_with(quantize: bool) -> None:
    before = memory_of("cuda")
    model, _ = on_device(quantize)  # its optimizer has the flat weights and gradients
    tolerance = 4 * MIB  # segments of 2 MiB are reserved, not all of which tensors have
    assert memory_of("cuda") == pytest.approx(before, abs=tolerance)
    assert memory_for(model) == pytest.approx(before, abs=tolerance)
    held = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
    assert memory_of("cuda") == pytest.approx(before, abs=tolerance)
    assert memory_for(model) == pytest.approx(before - held.nbytes, abs=tolerance)
    del held
    assert memory_for(model) == pytest.approx(before, abs=tolerance)  # what is freed is free, reserved or not


def test_what_a_dead_cycle_had_is_free_again() -> None:
    model, _ = on_device()
    before, allocated = memory_for(model), torch.cuda.memory_allocated()
    gc.disable()
    try:
        cycle: list[Any] = [torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")]
        cycle.append(cycle)
        del cycle
        assert memory_for(model) < before - 60 * MIB
        release_unused("cuda")
    finally:
        gc.enable()
    assert torch.cuda.memory_allocated() == allocated and memory_for(model) == pytest.approx(before, abs=4 * MIB)


@pytest.mark.simulated
def test_a_training_recomputes_where_others_have_the_memory(rng: np.random.Generator) -> None:
    model, _ = on_device()
    trees = random_trees(rng, 8, 200, 100, 2)
    settings = TrainingConfig(token_budget=4000, micro_batch_size=8)
    sizes: ForestSizes = fullest_sizes(trees, 4000, 8, "cuda")
    peak = forecast_training(ModelSizes.of(model), sizes).peak
    others = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    with simulated_cuda.memory_limit(round(peak / 0.9) + others + MIB):
        assert plan_checkpointing(model, trees, settings) == 0
        held = torch.zeros(round(0.2 * peak), dtype=torch.uint8, device="cuda")
        assert plan_checkpointing(model, trees, settings) > 0
        del held
        assert plan_checkpointing(model, trees, settings) == 0


def test_a_measurement_says_what_was_reserved() -> None:
    release_unused("cuda")
    before = torch.cuda.memory_reserved()
    with measured("cuda", lambda: []) as taken:
        torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
    record = taken.record(Forecast("dpo", workspace=70.0 * MIB), [])
    assert record["forecast_bytes"] == 70 * MIB
    assert 64 * MIB <= record["measured_bytes"] <= record["reserved_bytes"] <= before + 66 * MIB
