"""Forecast peaks against what the GPU's allocator says, within 10 %."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import simulated_cuda
import torch
from helpers.small_training import SmallModel, random_trees, run

from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.generation.kv_store import PROMPT_STEP
from srcfast.memory.activations import ForestSizes
from srcfast.memory.forecast import forecast_decoding, forecast_forward, forecast_training
from srcfast.memory.model_sizes import ModelSizes
from srcfast.training.optimizer import AdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.triton,  # its kernels' memory is what is forecast
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TENTH = 0.1
# So large that the libraries' own workspaces, some tens of MiB, weigh little: about 4 GiB in all.
LARGE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_layers": 12,
    "num_heads": 16,
    "num_kv_heads": 16,
    "head_dim": 128,
}
# On the simulated device, which has no such workspaces, and computes on the CPU.
SMALL = LARGE | {
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 64,
}
SHAPE, TOKENS = (
    (SMALL, (20, 10)) if simulated_cuda.is_active() else (LARGE, (640, 192))
)  # tokens of prompts and responses


@pytest.fixture(autouse=True)
def _nothing_else_in_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def model_on_gpu(quantize: bool = False, dtype: torch.dtype = torch.bfloat16) -> SmallModel:
    model = SmallModel(SHAPE, LoRAConfig(r=16, alpha=32.0), dtype, quantize).cuda()
    gc.collect()
    torch.cuda.empty_cache()
    return model


@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)],
    ids=["bf16", "nf4", "fp32"],
)
@pytest.mark.parametrize("every", [0, 2, 6])
def test_a_training_step_peaks_where_it_was_forecast(
    rng: np.random.Generator, every: int, dtype: torch.dtype, quantize: bool
) -> None:
    """In fp32 FlashAttention has no kernels: padded groups are attended to instead."""
    if simulated_cuda.is_active() and every > SHAPE["num_layers"]:
        pytest.skip("the small model has fewer layers than a group")
    model = model_on_gpu(quantize, dtype).train()
    model.decoder.checkpoint_layers = every
    forest = Forest.of(random_trees(rng, 5, *TOKENS, 2))
    sizes, own = ModelSizes.of(model), ForestSizes.of(forest, "cuda")
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    on_gpu = forest.to("cuda")
    optimizer.zero_grad()
    optimizer.step(0.0)  # the optimizer's moments are there from its first step on
    for _ in range(1 if simulated_cuda.is_active() else 2):  # on a GPU the first one sets up libraries and kernels
        torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad()
        run(model, on_gpu)
        optimizer.step(1e-3)
    forecast = forecast_training(sizes, own, checkpoint_every=every)
    assert forecast.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=TENTH)


def test_forward_passes_peak_where_it_was_forecast(rng: np.random.Generator) -> None:
    model = model_on_gpu()
    forest = Forest.of(random_trees(rng, 8 if simulated_cuda.is_active() else 16, *TOKENS, 2))
    sizes, own = ModelSizes.of(model), ForestSizes.of(forest, "cuda")
    on_gpu = forest.to("cuda")
    if not simulated_cuda.is_active():  # on a GPU the first one sets up libraries and kernels
        with torch.no_grad():
            model(on_gpu)
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(on_gpu)
    forecast = forecast_forward(sizes, own, head_rows=0, stage="preferences")
    assert forecast.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=TENTH)


def test_prompts_that_are_run_before_decoding_fit_the_forecast(rng: np.random.Generator) -> None:
    model = model_on_gpu()
    trees = [Tree((Segment(rng.integers(0, 300, TOKENS[0])),)) for _ in range(6)]
    forest = Forest.of(trees)
    sizes, own = ModelSizes.of(model), ForestSizes.of(forest, "cuda")
    forecast = forecast_decoding(
        sizes, own, samples=6, rows=8, prompt_tokens=TOKENS[0], new_tokens=256, stage="candidates"
    )
    shapes = sizes.shapes
    room = -(-TOKENS[0] // PROMPT_STEP) * PROMPT_STEP
    assert forecast.keys_and_values == 2 * shapes.layers * shapes.key * 2 * 6 * (room + 8 * 256)
    with torch.no_grad():
        model(forest.to("cuda"))
    assert torch.cuda.max_memory_allocated() <= 1.1 * (forecast.peak - forecast.keys_and_values)
