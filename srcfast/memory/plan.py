"""Forecast each stage's peak memory from a run's settings alone.

Stages are named as in the run directory: rationale, candidates, scores, preferences (its references), dpo, evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srcfast import distributed
from srcfast.config.settings import Config, TrainingConfig
from srcfast.data.batching import global_batch, num_updates
from srcfast.data.forest import Forest, Segment, Tree, pack_sizes
from srcfast.generation.decode import IMAGES_AHEAD, PREFILL_TOKENS
from srcfast.memory.activations import ForestSizes
from srcfast.memory.checkpoint_shapes import CheckpointShapes, checkpoint_shapes
from srcfast.memory.forecast import (
    Forecast,
    forecast_decoding,
    forecast_forward,
    forecast_training,
    least_checkpointing,
)
from srcfast.memory.model_sizes import ModelSizes, memory_of
from srcfast.models.embedded import checkpoint_directory
from srcfast.units import parse_bytes

TRAINING = ("rationale", "dpo")
DECODING = ("candidates", "evaluation")
MAX_STEPS_SEARCHED = 1000
STAGES = ("rationale", "candidates", "scores", "preferences", "dpo", "evaluation")


@dataclass(frozen=True)
class Lengths:
    """Tokens of a typical sample: its prompt's text without the image, and a response."""

    text: int = 64
    response: int = 192


def device_memory(config: Config) -> float:
    """Return the bytes to plan with: the settings' `memory`, or the device's; infinite for a GPU that isn't here."""
    limit = math.inf if config.memory is None else float(parse_bytes(config.memory, "memory"))
    if torch.device(config.model.device).type == "cuda" and not torch.cuda.is_available():
        return limit
    return min(limit, memory_of(config.model.device))


# Sizes ------------------------------------------------------------------------------------------------------


def policy_sizes(config: Config) -> ModelSizes:
    """Return the sizes of the settings' LVLM, with a new adapter."""
    path = str(checkpoint_directory(config.model.path, "base"))
    shapes = _shapes_of(path, config.model.backbone)
    return ModelSizes.of_tensors(
        shapes.tensors,
        shapes.config,
        image_tokens=shapes.image_tokens,
        linears=shapes.linears,
        replaced=shapes.replaced,
        dtype=config.model.dtype,
        device_type=torch.device(config.model.device).type,
        quantize=config.model.quantize,
        lora=config.lora,
        vision_offload=config.model.vision_offload,
        ranks=sharing_ranks(config),
    )


def sharing_ranks(config: Config) -> int:
    """Return the number of ranks over which the base is sharded."""
    return node_ranks(config) if config.distributed.shard else 1


def node_ranks(config: Config) -> int:
    """Return the number of ranks of a node: of this run, or of one rank the number that the settings plan for."""
    return distributed.local_world_size() if distributed.world_size() > 1 else config.distributed.ranks or 1


def scorer_sizes(config: Config) -> ModelSizes:
    """Return the sizes of the settings' R-Scorer."""
    path = str(checkpoint_directory(config.scorer.path, "scorer"))
    shapes, device = _shapes_of(path, "auto"), torch.device(config.model.device).type
    return ModelSizes.of_tensors(
        shapes.tensors,
        shapes.config,
        linears=shapes.linears,
        replaced=shapes.replaced,
        dtype=config.scorer.dtype,
        device_type=device,
    )


def _shapes_of(path: str, backbone: str) -> CheckpointShapes:
    """Read a checkpoint's shapes, again only when its files have changed."""
    files = sorted(Path(path).glob("*.safetensors")) + sorted(Path(path).glob("config.json"))
    stamp = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _read_shapes(path, backbone, stamp)


@lru_cache(maxsize=8)
def _read_shapes(path: str, backbone: str, stamp: tuple[tuple[str, int, int], ...]) -> CheckpointShapes:
    return checkpoint_shapes(path, backbone)


def typical_tree(config: Config, stage: str, lengths: Lengths) -> Tree:
    """Return a sample's tree in a stage, with segments of typical lengths; in decoding it is the prompt alone."""
    if stage == "scores":
        count = config.candidates.num_candidates + config.candidates.plain_samples
        contenders = min(count, 2 * config.scorer.finalists or count)
        segments = [_segment(2 * lengths.text)]  # the question, and what to judge by
        for number in range(count):
            segments.append(_segment(lengths.response, 0))
            # Against each other contender, and against none.
            seconds = contenders if config.scorer.mode == "pairwise" and number < contenders else 1
            segments += [_segment(lengths.response, len(segments) - 1)] * seconds
        return Tree(tuple(segments))
    vision = policy_sizes(config).vision
    prompt = _segment(lengths.text + (0 if vision is None else vision.image_tokens))
    leaves = {"rationale": 1, "preferences": 2, "dpo": 2}.get(stage, 0)
    return Tree((prompt, *[_segment(lengths.response, 0)] * leaves))


def _segment(tokens: int, parent: int = -1) -> Segment:
    return Segment(np.zeros(max(1, tokens), dtype=np.int64), parent)


# Forecasts --------------------------------------------------------------------------------------------------


def forecast_stage(
    config: Config,
    stage: str,
    *,
    memory: float | None = None,
    limit: float | None = None,
    lengths: Lengths = Lengths(),  # noqa: B008  (frozen)
    token_budget: int | None = None,
    forest: ForestSizes | None = None,
    images: int | None = None,
) -> Forecast:
    """Forecast a stage's peak.

    Args:
        config: the run's settings.
        stage: one of `STAGES`, or headroom.
        memory: bytes of the device, by which checkpointing and offloading are chosen; None: `device_memory`.
        limit: bytes that automatic checkpointing has to fit into, if fewer than the device has.
        lengths: of a typical sample.
        token_budget: replaces the settings' token budget and their maximum of trees in a forest.
        forest: the fullest forest of the stage; None: one of typical samples.
        images: number of the stage's distinct images; None: more than are cached.
    """
    memory = device_memory(config) if memory is None else memory
    if stage == "headroom":  # it runs these two, one after the other
        forecasts = [forecast_stage(config, name, memory=memory, lengths=lengths) for name in ("candidates", "scores")]
        on_gpu = torch.device(config.model.device).type == "cuda"
        return replace(max(forecasts, key=lambda forecast: forecast.peak if on_gpu else forecast.counted), stage=stage)
    model = policy_sizes(config)
    tree = typical_tree(config, stage, lengths)
    single = ForestSizes.of(Forest.of([tree]), model.device_type)  # a forest of one tree
    if stage in DECODING:
        decoding = config.candidates if stage == "candidates" else config.evaluation
        search = config.candidates if stage == "candidates" else None
        return forecast_decoding(
            model,
            single.times(min(decoding.batch_size, max(1, PREFILL_TOKENS // tree.num_tokens))),
            samples=decoding.batch_size,
            rows=1 if search is None else search.num_beams * search.proposals,
            prompt_tokens=tree.num_tokens,
            # A search's row continues to the end of its sentence before it is cut.
            new_tokens=decoding.max_new_tokens + (0 if search is None else search.max_sentence_tokens),
            graphs=decoding.cuda_graphs and sharing_ranks(config) == 1,
            memory=memory,
            images=images,
            images_a_step=decoding.batch_size + IMAGES_AHEAD,
            stage=stage,
        )
    section: Any = {"rationale": config.rationale, "scores": config.scorer}.get(stage, config.dpo)
    trees = section.token_budget // single.tokens
    if stage in TRAINING:
        trees = min(section.micro_batch_size, trees)
    # The comparisons of a sample may be cut into several trees; no other stage cuts one.
    least = min(1.0, section.token_budget / single.tokens) if stage == "scores" else 1.0
    forest = forest or single.times(max(least, trees) if token_budget is None else token_budget / single.tokens)
    if stage == "preferences":
        return forecast_forward(model, forest, memory=memory, images=images, stage=stage)
    if stage == "scores":
        return _scoring(config, model, forest, memory)

    def peak(every: int) -> Forecast:
        return forecast_training(
            model,
            forest,
            optimizer=section.optimizer,
            checkpoint_every=every,
            memory=memory,
            images=images,
            images_a_step=section.global_batch_size,
            stage=stage,
        )

    checkpointing = section.activation_checkpointing
    if checkpointing == "auto":
        checkpointing = least_checkpointing(peak, model.shapes.layers, memory if limit is None else limit)
    return peak(checkpointing)


def forecast_items(config: Config, stage: str, trees: Sequence[Tree], loop: TrainingConfig) -> Forecast:
    """Forecast a training stage's peak on the largest forest that the loop packs of these trees."""
    device = torch.device(config.model.device).type
    members = largest_forest([tree.num_tokens for tree in trees], loop)
    forest = ForestSizes.of(Forest.of([trees[index] for index in members]), device)
    return forecast_stage(config, stage, forest=forest, images=len({image for tree in trees for image in tree.images}))


def largest_forest(sizes: Sequence[int], loop: TrainingConfig) -> list[int]:
    """Find the items of a training run's largest forest, by tokens; of a long run, among at least 500 of its steps."""
    total = num_updates(len(sizes), loop)
    largest: list[int] = []
    for step in range(0, total, math.ceil(total / MAX_STEPS_SEARCHED)):
        batch = global_batch(len(sizes), step, loop)
        for members in pack_sizes([sizes[i] for i in batch], loop.token_budget, loop.micro_batch_size, keys=batch):
            items = [batch[member] for member in members]
            largest = max(largest, items, key=lambda packed: sum(sizes[i] for i in packed))
    return largest


def _scoring(config: Config, policy: ModelSizes, forest: ForestSizes, memory: float) -> Forecast:
    """Forecast the R-Scorer's peak, with the policy in memory if both fit."""
    alone = forecast_forward(scorer_sizes(config), forest, head_rows=0, stage="scores")
    together = replace(
        alone,
        weights=alone.weights + policy.weight_bytes,
        quantisation_state=float(policy.quantisation_bytes),
        adapter=0.0 if policy.lora is None else 4.0 * policy.lora.parameters,
    )
    return together if together.fits(memory) else alone


def policy_stays(config: Config, memory: float | None = None) -> bool:
    """Return whether policy and R-Scorer fit into memory together; otherwise the policy has to be offloaded."""
    return forecast_stage(config, "scores", memory=memory).weights > scorer_sizes(config).weight_bytes
