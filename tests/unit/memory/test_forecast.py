"""Forecast memory against memory that is there: saved tensors, live tensors, parameters, the optimizer's state."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.live_tensors import LiveTensors
from helpers.small_training import SHAPES, SmallModel, random_trees, run
from PIL import Image

from srcfast.config.settings import LoRAConfig, TrainingConfig
from srcfast.data.forest import Forest
from srcfast.data.logit_rows import response_logit_rows
from srcfast.errors import ConfigError
from srcfast.memory.activations import ForestSizes, activation_bytes, adapted_image_bytes, fullest_forest
from srcfast.memory.forecast import (
    Forecast,
    forecast_training,
    images_at_once,
    largest_fitting,
    least_checkpointing,
    moment_bytes,
    plan_checkpointing,
)
from srcfast.memory.measure import SavedTensors, measured
from srcfast.memory.model_sizes import ModelSizes, VisionSizes, limit_memory, memory_of
from srcfast.models import load_lvlm
from srcfast.models.lora import TARGETS
from srcfast.models.quantized import NF4Linear

TENTH = 0.1  # what the forecast is held to
SHAPE_NAMES = sorted(SHAPES)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def forest_of(
    rng: np.random.Generator, count: int = 6, prompt: int = 80, response: int = 40, leaves: int = 2
) -> Forest:
    return Forest.of(random_trees(rng, count, prompt, response, leaves))


def saved(model: SmallModel, forest: Forest) -> int:
    """Bytes of the distinct storages that autograd saves, without those of parameters."""
    kept: dict[int, int] = {}
    left_out = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    total = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(model, forest, lambda: total.append(sum(kept.values())))
    return total[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPE_NAMES)
def test_activations_are_those_that_autograd_saves(rng: np.random.Generator, shape: str, dtype: str) -> None:
    model = SmallModel(SHAPES[shape], LoRAConfig(r=8, alpha=32.0), DTYPES[dtype])
    for forest in (forest_of(rng), forest_of(rng, 9, 60, 60, 1), forest_of(rng, 1, 300, 200)):
        forecast = activation_bytes(ModelSizes.of(model), ForestSizes.of(forest, "cpu")).at_the_head
        # Measured so far: within 1 %.
        assert forecast == pytest.approx(saved(model, forest), rel=0.03)


@pytest.mark.parametrize(
    "lora",
    [
        LoRAConfig(r=4, target_modules=("q_proj", "v_proj"), alpha=32.0),
        LoRAConfig(r=4, target_modules=("k_proj", "o_proj", "down_proj"), alpha=32.0),
        LoRAConfig(r=24, target_modules=("gate_proj", "up_proj", "down_proj"), alpha=32.0),
        LoRAConfig(r=4, dropout=0.1, alpha=32.0),
    ],
    ids=["q and v", "k, o and down", "MLP", "dropout"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_other_adapters(rng: np.random.Generator, lora: LoRAConfig, dtype: str) -> None:
    model, forest = SmallModel({}, lora, DTYPES[dtype]).train(), forest_of(rng)
    forecast = activation_bytes(ModelSizes.of(model), ForestSizes.of(forest, "cpu")).at_the_head
    # The first layer keeps a little less, since nothing before its first adapter has a gradient.
    assert forecast == pytest.approx(saved(model, forest), rel=TENTH)


def test_activations_of_paths_too_long_for_scores_in_memory(rng: np.random.Generator) -> None:
    model, forest = SmallModel({}, LoRAConfig(r=4, alpha=32.0)), forest_of(rng, 2, 2400, 60)
    forecast = activation_bytes(ModelSizes.of(model), ForestSizes.of(forest, "cpu")).at_the_head
    assert forecast == pytest.approx(saved(model, forest), rel=TENTH)


@pytest.mark.parametrize("quantize", [False, True], ids=["whole weights", "4 bits"])
@pytest.mark.parametrize("every", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_training_pass_peaks_where_it_was_forecast(
    rng: np.random.Generator, dtype: str, every: int, quantize: bool
) -> None:
    """All of it: what is kept and recomputed, and what is alive for a moment, by tracking every tensor that is made."""
    model = SmallModel(SHAPES["as many keys as queries"], LoRAConfig(r=8, alpha=32.0), DTYPES[dtype], quantize).train()
    model.decoder.checkpoint_layers = every
    forest = forest_of(rng)
    run(model, Forest.of(forest.trees))  # gradients are there
    at_the_head = []
    with LiveTensors() as live:
        run(model, Forest.of(forest.trees), lambda: at_the_head.append(live.bytes))
    sizes, own = ModelSizes.of(model), ForestSizes.of(forest, "cpu")
    plans = own.inner.plan_bytes + own.last.plan_bytes  # masks and index maps
    assert activation_bytes(sizes, own, every).at_the_head + plans == pytest.approx(at_the_head[0], rel=TENTH)
    forecast = forecast_training(sizes, own, checkpoint_every=every)
    assert forecast.activations + forecast.workspace == pytest.approx(live.peak, rel=TENTH)


@pytest.mark.parametrize("vocabulary", [900, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pass_whose_peak_is_the_head(rng: np.random.Generator, dtype: str, vocabulary: int) -> None:
    model = SmallModel({"vocab_size": vocabulary}, LoRAConfig(r=4, alpha=32.0), DTYPES[dtype]).train()
    model.decoder.checkpoint_layers = 2
    forest = forest_of(rng, 12, 40, 50)
    run(model, Forest.of(forest.trees))
    with LiveTensors() as live:
        run(model, Forest.of(forest.trees))
    forecast = forecast_training(ModelSizes.of(model), ForestSizes.of(forest, "cpu"), checkpoint_every=2)
    assert forecast.activations + forecast.workspace == pytest.approx(live.peak, rel=TENTH)


def test_the_same_sizes_come_from_a_model_and_from_its_tensors() -> None:
    model = SmallModel(SHAPES["norms of queries and keys"], LoRAConfig(r=8, alpha=32.0), torch.bfloat16, quantize=True)
    whole = SmallModel(SHAPES["norms of queries and keys"], LoRAConfig(r=8, alpha=32.0))
    tensors = {
        name.replace(".base", ""): list(parameter.shape)
        for name, parameter in whole.named_parameters()
        if ".lora_" not in name
    }
    from_tensors = ModelSizes.of_tensors(
        tensors,
        whole.decoder.config,
        dtype="bfloat16",
        device_type="cpu",
        quantize="nf4",
        lora=LoRAConfig(r=8, target_modules=TARGETS),
    )
    found = ModelSizes.of(model)
    assert (found.parameters, found.weight_bytes, found.quantisation_bytes, found.shapes) == (
        from_tensors.parameters,
        from_tensors.weight_bytes,
        from_tensors.quantisation_bytes,
        from_tensors.shapes,
    )
    assert found.lora is not None and from_tensors.lora is not None
    assert set(found.lora.target_modules) == set(from_tensors.lora.target_modules)
    assert (found.lora.r, found.lora.parameters) == (from_tensors.lora.r, from_tensors.lora.parameters)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_what_adapters_on_images_save_is_counted(layers: int) -> None:
    model = load_lvlm("embedded", lora=LoRAConfig(r=8, alpha=16.0, projector=True, tower_layers=layers))
    images = [Image.effect_noise((72, 72), 90.0).convert("RGB") for _ in range(5)]
    stored = model.encode_images(images)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embeddings = torch.cat(model.vision.project(stored))
    found = embeddings.nbytes + sum(storage.nbytes() for place, storage in storages.items() if place not in weights)
    sizes = ModelSizes.of(model)
    # Of each norm and of attention a few numbers a row, too.
    assert found / len(images) == pytest.approx(adapted_image_bytes(sizes), rel=0.005 if layers else 1e-9)
    forest = ForestSizes.of(forest_of(np.random.default_rng(0)), "cpu")
    without = activation_bytes(replace(sizes, adapted_layers=None), forest)
    by_images = forest.tokens / 36 * adapted_image_bytes(sizes)
    assert activation_bytes(sizes, forest).peak == pytest.approx(without.peak + by_images)


@pytest.mark.parametrize("quantize", [False, True], ids=["whole weights", "4 bits"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_counted_to_the_byte(dtype: str, quantize: bool) -> None:
    model = SmallModel(
        {"hidden_size": 72, "intermediate_size": 150}, LoRAConfig(r=5, alpha=32.0), DTYPES[dtype], quantize
    )
    sizes = ModelSizes.of(model)
    held = sum(parameter.nbytes for parameter in model.parameters())
    four_bits = [part.weight for part in model.modules() if isinstance(part, NF4Linear) and part.weight is not None]
    assert bool(four_bits) == quantize
    held += sum(weight.num_bytes for weight in four_bits)
    assert sizes.lora is not None
    assert sizes.weight_bytes + sizes.quantisation_bytes + 4 * sizes.lora.parameters == held
    assert sizes.quantised == quantize


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_the_optimizers_state_is_as_large_as_forecast(name: Any) -> None:
    from srcfast.training.optimizer import AdamW

    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    parameters = [torch.nn.Parameter(torch.randn(64, 300)) for _ in range(4)]
    optimizer = AdamW(parameters, name=name)
    optimizer.gradients.normal_()
    optimizer.step(1e-3)
    state = sum(value.nbytes for value in optimizer.state_dict().values())
    assert state == pytest.approx(moment_bytes(name, 4 * 64 * 300, "cpu"), rel=0.01)


def test_moments_that_are_paged_out_take_nothing_of_a_gpu() -> None:
    assert moment_bytes("paged_adamw_8bit", 1000, "cuda") == moment_bytes("paged_adamw", 1000, "cuda") == 0.0
    assert moment_bytes("adamw_8bit", 1000, "cuda") < 0.3 * moment_bytes("adamw", 1000, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_an_image_takes_what_was_forecast(dtype: str) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    from srcfast.memory.forecast import _encoding_bytes
    from srcfast.models.vision import bare_model

    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=7,
        num_attention_heads=4,
        image_size=96,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(hidden_size=64, num_hidden_layers=2),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = bare_model(config).to(DTYPES[dtype]).eval()
    pixels = torch.randn(5, 3, 96, 96).to(DTYPES[dtype])
    with torch.no_grad():
        model.get_image_features(pixels)
        with LiveTensors() as live:
            model.get_image_features(pixels)
    sizes = ModelSizes.of(SmallModel({}, LoRAConfig(r=2, alpha=32.0), DTYPES[dtype]))
    forecast = 5 * _encoding_bytes(replace(sizes, vision=VisionSizes.of(config)))
    assert forecast == pytest.approx(live.peak, rel=TENTH)


# What is planned from it ----------------------------------------------------------------------------------------


def test_all_is_kept_where_it_fits_and_the_least_is_recomputed_where_it_does_not(rng: np.random.Generator) -> None:
    model = SmallModel({}, LoRAConfig(r=4, alpha=32.0)).train()
    trees = random_trees(rng, 30, 60, 30, 2)
    settings = TrainingConfig(token_budget=4000, micro_batch_size=8)
    forest = Forest.of([trees[i] for i in fullest_forest([tree.num_tokens for tree in trees], 4000, 8)])
    sizes, own = ModelSizes.of(model), ForestSizes.of(forest, "cpu")
    peaks = {every: forecast_training(sizes, own, checkpoint_every=every).peak for every in range(7)}
    for every in (0, 1):
        assert plan_checkpointing(model, trees, settings, memory=peaks[every] / 0.9 + 1) == every
    # Less than one layer at a time takes is given by no plan; then the leanest one is tried.
    leanest = min(peaks, key=lambda every: peaks[every])
    assert plan_checkpointing(model, trees, settings, memory=0.5 * peaks[leanest]) == leanest


def test_what_recomputes_least_of_what_fits_is_taken(rng: np.random.Generator) -> None:
    layers = 9
    # Layers run again with groups of 1, 2, ..., 8 of nine layers: all but the last group's.
    again = {0: 0, 1: 8, 2: 8, 3: 6, 4: 8, 5: 5, 6: 6, 7: 7, 8: 8}
    for _ in range(20):
        peaks = dict(enumerate(rng.uniform(10.0, 100.0, layers).tolist()))
        memory = float(rng.uniform(5.0, 110.0))
        found = least_checkpointing(lambda every: Forecast("training", activations=peaks[every]), layers, memory / 0.9)  # noqa: B023
        fitting = [every for every, peak in peaks.items() if peak <= memory]
        if not fitting:
            assert found == min(peaks, key=lambda every: peaks[every])  # noqa: B023
            continue
        assert found in fitting and again[found] == min(again[every] for every in fitting)


@pytest.mark.parametrize("budget", [100, 333])
def test_the_fullest_forest_respects_both_limits(rng: np.random.Generator, budget: int) -> None:
    sizes = rng.integers(5, 60, 40).tolist()
    for most in (1, 3, 50):
        chosen = fullest_forest(sizes, budget, most)
        assert len(chosen) <= most and sum(sizes[i] for i in chosen) <= budget
        left = sorted(set(range(40)) - set(chosen))
        room = budget - sum(sizes[i] for i in chosen)
        assert len(chosen) == most or all(sizes[i] > room for i in left)


@pytest.mark.parametrize("limit", [1, 3, 256, 300, 1 << 13])
@pytest.mark.parametrize("answer", [0, 1, 2, 3, 37, 255, 256, 257, 300, 4096, (1 << 13) - 1, 1 << 13, 10_000])
def test_the_most_that_fits_is_found_by_halving_and_never_exceeds_the_limit(answer: int, limit: int) -> None:
    assert largest_fitting(lambda value: value <= answer, limit) == min(answer, limit)


def test_fewer_images_are_encoded_at_once_where_there_is_little_memory() -> None:
    sizes = replace(
        ModelSizes.of(SmallModel({}, LoRAConfig(r=2, alpha=32.0))),
        vision=VisionSizes(24, 1024, 4096, 577, 576),
        dtype_bytes=2,
    )
    counts = [images_at_once(sizes, gib * 2**30) for gib in (1, 8, 12, 80)]
    assert counts == sorted(counts) and counts[0] < 8 and counts[-1] == 64
    assert all(
        count * 2 * 577 * (4 * 1024 + 3 * 4096) <= gib * 2**30 / 16 or count == 1
        for count, gib in zip(counts, (1, 8, 12, 80), strict=True)
    )


def test_a_limit_is_what_there_is() -> None:
    whole = memory_of("cpu")
    try:
        limit_memory(1 << 20)
        assert memory_of("cpu") == 1 << 20
        limit_memory(2 * whole)
        assert memory_of("cpu") == whole
    finally:
        limit_memory(None)
    assert memory_of("cpu") == whole


# What is measured -----------------------------------------------------------------------------------------------


def test_saved_tensors_are_counted_while_they_live(rng: np.random.Generator) -> None:
    model, forest = SmallModel({}, LoRAConfig(r=4, alpha=32.0)), forest_of(rng)
    expected = saved(model, forest)
    seen = []
    with SavedTensors(model.parameters) as counter:
        for _ in range(2):
            run(model, forest, lambda: seen.append(counter.bytes))
    assert seen == [expected, expected] and counter.peak == expected and counter.bytes == 0


def test_a_measurement_counts_the_model_the_optimizer_and_what_is_saved(rng: np.random.Generator) -> None:
    from srcfast.training.optimizer import AdamW

    model, forest = SmallModel({}, LoRAConfig(r=4, alpha=32.0)), forest_of(rng)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    with measured("cpu", model.parameters) as taken:
        run(model, forest)
        optimizer.step(1e-3)
    forecast = forecast_training(ModelSizes.of(model), ForestSizes.of(forest, "cpu"))
    record = taken.record(forecast, [model])
    assert record["forecast_bytes"] == pytest.approx(record["measured_bytes"], rel=TENTH)
    assert taken.optimizer == 3 * optimizer.weights.nbytes + 4  # gradients, two moments, a count of steps
    assert record["rss_growth_bytes"] >= 0


def test_a_limit_on_a_gpu_is_kept_by_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 << 30)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    try:
        limit_memory(12 << 30, "cuda:0")
        assert memory_of("cuda:0") == 12 << 30
        limit_memory(85 << 30, "cuda:0")  # so is a card of 80 GB called
        assert memory_of("cuda:0") == 75 << 30  # what is free, and what this process holds already
        with pytest.raises(ConfigError, match="80.0 GiB of cuda:0"):
            limit_memory(100 << 30, "cuda:0")
        limit_memory(None, "cuda:0")
    finally:
        limit_memory(None)
    assert shares == [12 / 80, 1.0, 1.0]


@pytest.mark.parametrize(("device", "index"), [("cuda", 1), ("cuda:0", 0)])
def test_a_limit_is_set_on_the_current_gpu_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch, device: str, index: int
) -> None:
    """Replaced is only what lies below `torch.cuda`, whose own functions check their arguments."""
    limits: list[tuple[float, int]] = []
    runtime = SimpleNamespace(cudaMemGetInfo=lambda index: (70 << 30, 80 << 30))
    for module in (torch.cuda, torch.cuda.memory):
        monkeypatch.setattr(module, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *limit: limits.append(limit), raising=False)
    try:
        for size in (None, 20 << 30):
            limit_memory(size, device)
    finally:
        limit_memory(None)
    assert limits == [(1.0, index), (0.25, index)]


def test_a_steps_images_are_in_memory_even_where_fewer_would_be_kept(rng: np.random.Generator) -> None:
    sizes = replace(
        ModelSizes.of(SmallModel({}, LoRAConfig(r=2, alpha=32.0))), vision=VisionSizes(4, 64, 128, 100, 1000)
    )
    own = ForestSizes.of(forest_of(rng), "cpu")
    image = 1000 * 64 * 4  # tokens, hidden size, fp32
    for memory, images, a_step, kept in ((32e6, None, 2, 1e6), (32e6, None, 9, 9 * image), (32e6, 3, 9, 3 * image)):
        found = forecast_training(sizes, own, memory=memory, images=images, images_a_step=a_step)
        assert found.image_features == kept


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("shape", ["tied", "norms of queries and keys"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_is_trained_as_a_whole_peaks_where_it_was_forecast(
    rng: np.random.Generator, dtype: str, shape: str, every: int
) -> None:
    """As an R-Scorer is trained: of the head a few tokens' rows alone."""
    model = SmallModel(SHAPES[shape], None, DTYPES[dtype]).train()
    model.requires_grad_(True)
    model.decoder.checkpoint_layers = every
    forest = forest_of(rng)
    trees = forest.trees
    rows, verdicts = response_logit_rows(forest), torch.tensor([3, 7, 9])

    def step() -> None:
        forest = Forest.of(trees)
        (model(forest, rows).float() @ model.decoder.head_weight[verdicts].float().T).sum().backward()

    step()
    with LiveTensors() as live:
        step()
    sizes, own = ModelSizes.of(model), replace(ForestSizes.of(forest, "cpu"), head_rows=0)
    assert sizes.trained == sum(parameter.numel() for parameter in model.parameters())
    forecast = forecast_training(sizes, own, checkpoint_every=every)
    assert forecast.activations + forecast.workspace == pytest.approx(live.peak, rel=TENTH)
    assert forecast.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    assert forecast.optimizer == 2 * forecast.gradients
