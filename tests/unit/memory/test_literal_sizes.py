"""Forecasts of a model of literal sizes by the formulas of docs/memory.md, written out part by part."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from srcfast.config.settings import LoRAConfig
from srcfast.memory.activations import (
    TOGETHER,
    AttentionReads,
    ForestSizes,
    activation_bytes,
    fullest_forest,
    layer_bytes,
)
from srcfast.memory.flops import attended_of, decode_flops, forward_flops, training_flops
from srcfast.memory.forecast import (
    IMAGE_CACHE,
    Forecast,
    forecast_decoding,
    forecast_forward,
    forecast_training,
    image_cache,
    images_at_once,
    least_checkpointing,
    moment_bytes,
    recomputed_layers,
)
from srcfast.memory.measure import Measurement
from srcfast.memory.model_sizes import LoRASizes, ModelSizes, Shapes, VisionSizes

# D 8, Q 16 (4 heads of 4), K 8 (2 heads), F 24, V 100, 6 layers; an adapter of rank 2 on all seven linears.
D, Q, K, F, V, LAYERS, R = 8, 16, 8, 24, 100, 6, 2
A = LAYERS * R * ((D + Q) + 2 * (D + K) + (Q + D) + 2 * (D + F) + (F + D))
ALL = tuple(name for names in TOGETHER for name in names)
MODEL = ModelSizes(
    shapes=Shapes(LAYERS, D, Q, K, F, V, head_dim=4),
    device_type="cuda",
    dtype_bytes=2,
    parameters={"decoder": 10_000},
    weight_bytes=20_000,
    quantisation_bytes=0,
    lora=LoRASizes(R, ALL, 0.0, A),
)
T, M, H = 50, 20, 18  # tokens, rows of the last layer, rows of the head
FOREST = ForestSizes(T, H, 700, AttentionReads(T, 60, ()), AttentionReads(M, 55, ()))
LAYER = 2 * T * (2 * D + 2 * F + 7 * R) + 8 * T + 2 * (2 * Q * T + 2 * K * 60) + 4 * 4 * T + 2 * A / LAYERS
# Queries have another input than keys and values, and the MLP's norm has the rows alone.
LAST = (T + 2 * M) * (2 * D + 4) + 2 * M * F * 2 + 2 * (2 * Q * M + 2 * K * 55) + 4 * 4 * M
LAST += 2 * R * (2 * T + 5 * M) + 2 * A / LAYERS
ANGLES, HEAD = 2 * T * 4 * 2, 2 * M * D * 2 + 4 * M + H * (2 * D + 16)


def test_a_layer_saves_what_the_formula_says() -> None:
    assert layer_bytes(MODEL, T, FOREST.inner) == pytest.approx(LAYER)
    assert layer_bytes(MODEL, T, FOREST.last) == pytest.approx(LAST)
    assert A == 6 * 2 * (24 + 32 + 24 + 64 + 32)


def test_a_pass_saves_its_layers_and_the_head() -> None:
    saved = activation_bytes(MODEL, FOREST)
    assert saved.below == pytest.approx(ANGLES + 5 * LAYER)
    assert saved.at_the_head == pytest.approx(ANGLES + 5 * LAYER + LAST + HEAD)
    assert saved.peak == saved.at_the_head


@pytest.mark.parametrize(("every", "groups", "tail"), [(1, 6, 1), (2, 3, 2), (3, 2, 3), (4, 2, 2), (5, 2, 1)])
def test_with_groups_their_inputs_are_saved_and_one_group_while_it_is_recomputed(
    every: int, groups: int, tail: int
) -> None:
    """The first layer of a recomputed group counts its input once: it is one of the groups' inputs."""
    row = T * D * 2
    inputs = ANGLES + (groups - 1) * row
    saved = activation_bytes(MODEL, FOREST, every)
    assert saved.at_the_head == pytest.approx(inputs + (tail - 1) * LAYER + LAST + HEAD)
    assert saved.below == pytest.approx(max(inputs + (tail - 1) * LAYER, inputs + every * LAYER - row))
    assert recomputed_layers(LAYERS, every) == (groups - 1) * every == LAYERS - tail


def test_nothing_is_recomputed_without_groups() -> None:
    assert recomputed_layers(LAYERS, 0) == 0


def test_a_training_s_parts_are_bytes_of_their_types() -> None:
    forecast = forecast_training(MODEL, FOREST, optimizer="adamw", stage="dpo")
    assert forecast.weights == 20_000 and forecast.quantisation_state == 0
    assert (forecast.adapter, forecast.gradients, forecast.optimizer) == (4 * A, 4 * A, 8 * A)
    assert forecast.activations == pytest.approx(ANGLES + 5 * LAYER + LAST + HEAD)
    assert forecast.image_features == forecast.keys_and_values == 0
    # At the head: logits of H rows in fp32, their product with the head, the head's input rows.
    head = 4 * H * V + 2 * H * D + 2 * H * D
    mlp = 2 * M * (3 * F + 2 * D)
    inputs = 2 * M * (2 * F + 4 * D)
    attention = 2 * (M * (2 * D + 3 * Q) + 2 * 55 * K) + 4 * M * Q - 2 * M * (2 * F + D)
    assert forecast.workspace == pytest.approx(max(head, mlp, inputs, attention))
    counted = forecast.weights + 4 * A + 4 * A + 8 * A + forecast.activations
    assert forecast.counted == pytest.approx(counted) and forecast.peak == pytest.approx(counted + forecast.workspace)


def test_a_trained_base_has_gradients_and_moments_in_its_type() -> None:
    trained = replace(MODEL, trained=1000, lora=None)
    forecast = forecast_training(trained, FOREST, optimizer="adamw", stage="scorer")
    assert (forecast.adapter, forecast.gradients, forecast.optimizer) == (0, 2000, 4000)


@pytest.mark.parametrize(
    ("optimizer", "device", "width", "size"),
    [
        ("adamw", "cuda", 4, 8000),
        ("adamw", "cpu", 2, 4000),
        ("adamw_8bit", "cuda", 4, 2000 * (1 + 1 / 64)),
        ("paged_adamw", "cuda", 4, 0),
        ("paged_adamw", "cpu", 4, 8000),
        ("paged_adamw_8bit", "cuda", 4, 0),
        ("paged_adamw_8bit", "cpu", 4, 2000 * (1 + 1 / 64)),
    ],
)
def test_moments(optimizer: str, device: str, width: int, size: float) -> None:
    assert moment_bytes(optimizer, 1000, device, width) == pytest.approx(size)


def test_a_forward_pass_takes_its_mlp_or_the_head() -> None:
    forecast = forecast_forward(MODEL, FOREST, stage="preferences")
    head = T * D * 2 + 4 * H * V + 2 * H * D
    mlp = 2 * T * (3 * D + 3 * F)
    assert forecast.workspace == pytest.approx(max(head, mlp, 2 * (T * (2 * D + 3 * Q) + 2 * 60 * K)))
    judged = forecast_forward(MODEL, FOREST, head_rows=0, stage="scores")
    assert judged.workspace == pytest.approx(max(mlp, 2 * (T * (2 * D + 3 * Q) + 2 * 60 * K)))
    assert judged.gradients == judged.optimizer == judged.activations == 0


def test_decoding_caches_keys_and_values_of_each_position() -> None:
    """A GPU's prompts have a multiple of 64 positions, its rows of 16."""
    options: dict[str, Any] = {"samples": 3, "rows": 4, "prompt_tokens": 70, "new_tokens": 20, "stage": "candidates"}
    forecast = forecast_decoding(MODEL, FOREST, **options)
    assert forecast.keys_and_values == 2 * LAYERS * K * 2 * (3 * 128 + 12 * 32)
    assert forecast.states == forecast.graphs == 0
    states = replace(MODEL, state_bytes=10.0)
    assert forecast_decoding(states, FOREST, **options).states == 10 * 3 * (1 + 4)


def test_a_forecast_fits_into_nine_tenths() -> None:
    forecast = Forecast("dpo", weights=50.0, workspace=40.0)
    assert forecast.fits(100.0) and forecast.fits(90 / 0.9) and not forecast.fits(99.9)
    assert forecast.peak == 90.0 and forecast.counted == 50.0


def test_as_little_is_recomputed_as_fits_and_the_lowest_peak_where_nothing_fits() -> None:
    peaks = {0: 100.0, 1: 40.0, 2: 50.0, 3: 60.0, 4: 70.0, 5: 80.0}  # recomputed: 0, 5, 4, 3, 4, 5

    def chosen(memory: float) -> int:
        return least_checkpointing(lambda every: Forecast("dpo", workspace=peaks[every]), LAYERS, memory / 0.9)

    assert [chosen(memory) for memory in (100, 99, 60, 59, 50, 45, 30)] == [0, 3, 3, 2, 2, 1, 1]


# Images, weights, counts ------------------------------------------------------------------------------------------------

VISION = VisionSizes(2, 32, 64, 16, 9)
SEEING = replace(MODEL, vision=VISION, waiting_bytes=500.0)
ENCODED = 2 * 16 * (4 * 32 + max(3 * 64, 4 * 32))  # bytes of one image's activations


@pytest.mark.parametrize(
    ("memory", "cache"), [(None, 1 << 30), (1 << 40, 1 << 30), (1 << 30, 1 << 25), (32 * (1 << 30), 1 << 30)]
)
def test_features_of_a_thirty_second_of_the_memory_are_cached(memory: float | None, cache: int) -> None:
    assert image_cache(memory) == cache <= IMAGE_CACHE


def test_images_are_encoded_in_a_sixteenth_of_the_memory() -> None:
    assert images_at_once(SEEING, 16 * ENCODED * 5.9) == 5
    assert images_at_once(SEEING, 1.0) == 1 and images_at_once(SEEING, None) == 64 == images_at_once(SEEING, 1e15)


@pytest.mark.parametrize(
    ("images", "a_step", "cached", "encoded"),
    [(0, 0, 0, 0), (3, 0, 3, 3), (None, 0, 4, 5), (None, 7, 7, 5), (2, 7, 2, 2)],
)
def test_an_image_s_features_are_its_positions_vectors(
    images: int | None, a_step: int, cached: int, encoded: int
) -> None:
    """The memory is such that a sixteenth takes five images' activations; a thirty-second has more than four's features."""
    memory = 16 * ENCODED * 5.0
    features = 9 * D * 2
    forecast = forecast_training(
        SEEING, FOREST, optimizer="adamw", memory=memory, images=images, images_a_step=a_step, stage="dpo"
    )
    if cached == 4:
        assert forecast.image_features == int(memory / 32)
    elif cached == 7:
        assert forecast.image_features == max(7 * features, int(memory / 32))
    else:
        assert forecast.image_features == cached * features
    without = forecast_training(MODEL, FOREST, optimizer="adamw", stage="dpo")
    need = 500.0 + encoded * ENCODED if encoded else 0.0
    during = without.activations + without.workspace
    assert forecast.activations + forecast.workspace == pytest.approx(max(during, need))


TENSORS = {
    "model.language_model.embed_tokens.weight": (100, 8),
    "model.language_model.layers.0.self_attn.q_proj.weight": (16, 8),
    "model.language_model.layers.0.mlp.down_proj.weight": (8, 24),
    "model.language_model.layers.0.input_layernorm.weight": (8,),
    "model.vision_tower.a.weight": (10, 10),
    "model.multi_modal_projector.b.weight": (8, 10),
    "lm_head.weight": (100, 8),
}
CONFIG = SimpleNamespace(
    hidden_size=8, num_attention_heads=4, head_dim=4, num_hidden_layers=1, num_key_value_heads=2, intermediate_size=24,
    vocab_size=100, model_type="llama",
)  # fmt: skip


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_by_part_type_and_place(device: str, offload: bool, quantize: str, ranks: int) -> None:
    sizes = ModelSizes.of_tensors(
        TENSORS, CONFIG, dtype="bfloat16", device_type=device, quantize=quantize, vision_offload=offload, ranks=ranks,
        lora=LoRAConfig(r=3, alpha=1.0, target_modules=("q_proj", "down_proj")),
    )  # fmt: skip
    linears = (128, 192)
    assert sizes.parameters == {"vision": 100, "projector": 80, "embedding": 800, "decoder": 8 + 320, "head": 800}
    waiting = 2 * 180 if offload and device == "cuda" else 0
    plain = 2 * (1600 + 8 + 180) - waiting
    scales = [math.ceil(n / 64) + 4 + 4 for n in linears] if quantize == "nf4" else [0, 0]
    packed = 320 // 2 if quantize == "nf4" else 2 * 320
    assert sizes.waiting_bytes == waiting
    assert sizes.weight_bytes == plain + packed / ranks and sizes.quantisation_bytes == round(sum(scales) / ranks)
    assert sizes.lora is not None and sizes.lora.parameters == 3 * (16 + 8) + 3 * (8 + 24)
    assert (sizes.gathered_bytes > 0) == (ranks > 1)


def vision_config(**changes: Any) -> Any:
    tower = {"image_size": 28, "patch_size": 14, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    vision = SimpleNamespace(**tower, model_type="clip_vision_model")
    values = {"vision_config": vision, "vision_feature_select_strategy": "default", "model_type": "llava"}
    return SimpleNamespace(**(values | changes))


FAMILIES = {
    "Qwen2-VL": (
        {"depth": 32, "embed_dim": 1280, "patch_size": 14, "spatial_merge_size": 2},
        {},
        VisionSizes(32, 1280, 5120, 4 * 50, 50),
    ),
    "Qwen3-VL": (
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16, "spatial_merge_size": 2}
        | {"deepstack_visual_indexes": (8, 16, 24)},
        {},
        VisionSizes(27, 1152, 4304, 4 * 50, 50, vectors=4),
    ),
    "InternVL": (
        {"num_hidden_layers": 24, "hidden_size": 1024, "image_size": [448, 448], "patch_size": [14, 14]},
        {"downsample_ratio": 0.5},
        VisionSizes(24, 1024, 4096, 32 * 32, 50),
    ),
    "Idefics3": (
        {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "image_size": 112, "patch_size": 16},
        {"scale_factor": 3},
        VisionSizes(12, 768, 3072, 9 * 50, 50),
    ),
    "as many patches as embeddings": (
        {"num_layers": 6, "hidden_size": 64, "image_size": 28, "patch_size": 14},
        {},
        VisionSizes(6, 64, 256, 50, 50),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_s_patches_are_those_that_its_embeddings_are_merged_of(family: str) -> None:
    """Of a side of 2 or 3 patches 4 or 9 are merged; a ratio of 1/2 merges 4; at least those of the image itself."""
    tower, others, expected = FAMILIES[family]
    config = SimpleNamespace(vision_config=SimpleNamespace(**tower), **others)
    assert VisionSizes.of(config, image_tokens=50) == expected


def test_an_image_s_positions_in_a_forecast() -> None:
    """4 patches; of LLaVA-NeXT the largest grid, 3 by 2 tiles of 2 by 2, with a newline behind each of its 6 rows."""
    assert VisionSizes.of(vision_config()).image_tokens == 4  # type: ignore[union-attr]
    assert VisionSizes.of(vision_config(vision_feature_select_strategy="full")).image_tokens == 5  # type: ignore[union-attr]
    tiled = VisionSizes.of(vision_config(model_type="llava_next", image_grid_pinpoints=[(28, 56), (84, 56), (28, 28)]))
    assert tiled is not None and tiled.image_tokens == 4 + 6 * (4 + 1)


def test_flops_by_the_formula() -> None:
    shapes = Shapes(LAYERS, D, Q, K, F, V, head_dim=4)
    n = LAYERS * D * (2 * Q + 2 * K + 3 * F)
    assert shapes.linear_weights == n
    assert training_flops(shapes, T, 700, H, A) == T * (4 * n + 6 * A) + 12 * Q * LAYERS * 700 + 4 * D * V * H
    assert forward_flops(shapes, T, 700, H, A) == T * (2 * n + 2 * A) + 4 * Q * LAYERS * 700 + 2 * D * V * H
    assert decode_flops(shapes, T, 700, A) == forward_flops(shapes, T, 700, T, A)
    assert attended_of(10, 4) == 11 + 12 + 13 + 14 and attended_of(0, 1) == 1


def test_what_was_recomputed_can_t_be_measured_on_a_cpu() -> None:
    measurement = Measurement("cpu", saved=30, optimizer=20, rss_growth=5)
    kept, recomputed = (Forecast("dpo", weights=40.0, workspace=9.0, checkpoint_every=every) for every in (0, 2))
    assert measurement.record(kept, []) == {"forecast_bytes": 40, "measured_bytes": 50, "rss_growth_bytes": 5}
    assert measurement.record(recomputed, [])["measured_bytes"] is None
    measurement = Measurement("cuda", peak=70, reserved=80, saved=30)
    assert measurement.record(recomputed, []) == {"forecast_bytes": 49, "measured_bytes": 70, "reserved_bytes": 80}


def test_a_cpu_s_masks_and_index_maps_are_counted_and_scale_with_the_trees() -> None:
    """Two blocks of 3 queries and 4 keys, and five of 1 and 2: masks in fp32, int64 for each query and key."""
    reads = AttentionReads(11, 20, ((2, 3, 4), (5, 1, 2)))
    assert reads.plan_bytes == 2 * (4 * 12 + 8 * 7) + 5 * (4 * 2 + 8 * 3)
    assert reads.times(3) == AttentionReads(33, 60, ((6, 3, 4), (15, 1, 2)))
    assert FOREST.times(2).tokens == 2 * T and FOREST.times(2).last.queries == 2 * M
    assert FOREST.times(2).attended == 1400 and FOREST.times(0.5).head_rows == H / 2


def test_the_fullest_forest_takes_the_largest_trees_that_still_fit() -> None:
    assert fullest_forest([4, 6, 3], 10, 8) == [1, 0]
    assert fullest_forest([4, 6, 3], 9, 8) == [1, 2]
    assert fullest_forest([4, 6, 3], 13, 2) == [1, 0]
    assert fullest_forest([4, 6, 3], 13, 3) == [1, 0, 2]
    assert fullest_forest([4, 6, 3], 2, 8) == []
