"""What a run will take, from its settings alone: each stage's peak memory, and what to change where it doesn't fit.

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
from srcfast.data.batching import global_batch, num_steps
from srcfast.data.forest import Forest, Segment, Tree, pack_sizes
from srcfast.generation.decode import IMAGES_AHEAD, PREFILL_TOKENS
from srcfast.memory.activations import ForestSizes
from srcfast.memory.checkpoint_shapes import checkpoint_shapes
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
STEPS_LOOKED_AT = 1000
STAGES = ("rationale", "candidates", "scores", "preferences", "dpo", "evaluation")


@dataclass(frozen=True)
class Lengths:
    """Tokens of a typical sample: its prompt's text beside the image, and a response."""

    text: int = 64
    response: int = 192


def device_memory(config: Config) -> float:
    """Bytes to plan with: the settings' `memory`, or what their device has; without end for a GPU that isn't here."""
    limit = math.inf if config.memory is None else float(parse_bytes(config.memory, "memory"))
    if torch.device(config.model.device).type == "cuda" and not torch.cuda.is_available():
        return limit
    return min(limit, memory_of(config.model.device))


# Sizes ------------------------------------------------------------------------------------------------------


def policy_sizes(config: Config) -> ModelSizes:
    """The LVLM of the settings, with a new adapter."""
    path = str(checkpoint_directory(config.model.path, "base"))
    tensors, found = _shapes_of(path)
    return ModelSizes.of_tensors(
        tensors,
        found,
        dtype=config.model.dtype,
        device_type=torch.device(config.model.device).type,
        quantize=config.model.quantize,
        lora_r=config.lora.r,
        target_modules=config.lora.target_modules,
        dropout=config.lora.dropout,
        vision_offload=config.model.vision_offload,
        ranks=sharing_ranks(config),
    )


def sharing_ranks(config: Config) -> int:
    """How many ranks share out the base."""
    if not config.distributed.shard:
        return 1
    return node_ranks(config)


def node_ranks(config: Config) -> int:
    """The ranks of a node: those that there are; without any, as many as the settings plan for."""
    return distributed.local_world_size() if distributed.world_size() > 1 else config.distributed.ranks or 1


def scorer_sizes(config: Config) -> ModelSizes:
    """The R-Scorer of the settings."""
    path = str(checkpoint_directory(config.scorer.path, "scorer"))
    tensors, found = _shapes_of(path)
    device = torch.device(config.model.device).type
    return ModelSizes.of_tensors(tensors, found, dtype=config.scorer.dtype, device_type=device)


def _shapes_of(path: str) -> tuple[dict[str, list[int]], Any]:
    files = sorted(Path(path).glob("*.safetensors")) + sorted(Path(path).glob("config.json"))
    return _read_shapes(path, tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@lru_cache(maxsize=8)
def _read_shapes(path: str, stamp: tuple[tuple[str, int, int], ...]) -> tuple[dict[str, list[int]], Any]:
    return checkpoint_shapes(path)


def typical_tree(config: Config, stage: str, lengths: Lengths) -> Tree:
    """A sample's tree in a stage, its segments of typical lengths; of decoding, the prompt alone."""
    if stage == "scores":
        count = config.candidates.num_candidates
        segments = [_segment(2 * lengths.text)]  # the question, and what to judge by
        for _ in range(count):
            segments.append(_segment(lengths.response, 0))
            # Beside every other one, and none.
            seconds = count if config.scorer.mode == "pairwise" else 1
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
    lengths: Lengths = Lengths(),  # noqa: B008  (frozen)
    token_budget: int | None = None,
    forest: ForestSizes | None = None,
    images: int | None = None,
) -> Forecast:
    """A stage's peak.

    Args:
        config: its settings.
        stage: one of `STAGES`, or headroom.
        memory: bytes of the device; decides what is done to fit into it (checkpointing, what is set aside). None: what
            `device_memory` finds.
        lengths: of a typical sample.
        token_budget: in place of the settings', and of their most trees in a forest.
        forest: in place of one of typical samples, the fullest that will be run.
        images: distinct ones of the stage; None: more than are kept.
    """
    room = device_memory(config) if memory is None else memory
    if stage == "headroom":  # both, one after the other
        parts = [forecast_stage(config, part, memory=room, lengths=lengths) for part in ("candidates", "scores")]
        on_gpu = torch.device(config.model.device).type == "cuda"
        return replace(max(parts, key=lambda part: part.peak if on_gpu else part.counted), stage=stage)
    model = policy_sizes(config)
    tree = typical_tree(config, stage, lengths)
    one = ForestSizes.of(Forest.of([tree]), model.device_type)
    if stage in DECODING:
        decoding = config.candidates if stage == "candidates" else config.evaluation
        search = config.candidates if stage == "candidates" else None
        return forecast_decoding(
            model,
            one.times(min(decoding.batch_size, max(1, PREFILL_TOKENS // tree.num_tokens))),
            samples=decoding.batch_size,
            rows=1 if search is None else search.num_beams * search.proposals,
            prompt_tokens=tree.num_tokens,
            # A search's row goes on to the end of its sentence before it is cut.
            new_tokens=decoding.max_new_tokens + (0 if search is None else search.max_sentence_tokens),
            graphs=decoding.cuda_graphs and sharing_ranks(config) == 1,
            memory=room,
            images=images,
            images_a_step=decoding.batch_size + IMAGES_AHEAD,
            stage=stage,
        )
    section: Any = config.rationale if stage == "rationale" else config.dpo
    trees: float
    if token_budget is not None:
        trees = token_budget / one.tokens
    elif stage in TRAINING:
        trees = max(1, min(section.micro_batch_size, section.token_budget // one.tokens))
    else:
        budget = config.scorer.token_budget if stage == "scores" else config.dpo.token_budget
        trees = max(1, budget // one.tokens)
    forest = forest or one.times(trees)
    if stage == "preferences":
        return forecast_forward(model, forest, memory=room, images=images, stage=stage)
    if stage == "scores":
        beside = _judging(config, model, forest, True)
        return beside if beside.fits(room) else _judging(config, model, forest, False)

    def peak(every: int) -> Forecast:
        return forecast_training(
            model,
            forest,
            optimizer=section.optimizer,
            checkpoint_every=every,
            memory=room,
            images=images,
            images_a_step=section.micro_batch_size * section.gradient_accumulation_steps,
            stage=stage,
        )

    stated = section.activation_checkpointing
    return peak(least_checkpointing(peak, model.shapes.layers, room) if stated == "auto" else stated)


def forecast_items(config: Config, stage: str, trees: Sequence[Tree], loop: TrainingConfig) -> Forecast:
    """A training stage's peak on these trees: on the largest forest that the loop makes of them."""
    device = torch.device(config.model.device).type
    members = largest_forest([tree.num_tokens for tree in trees], loop)
    forest = ForestSizes.of(Forest.of([trees[index] for index in members]), device)
    return forecast_stage(config, stage, forest=forest, images=len({image for tree in trees for image in tree.images}))


def largest_forest(sizes: Sequence[int], loop: TrainingConfig) -> list[int]:
    """Items of the largest forest of a training run, by tokens; of a long run some of its steps are looked at."""
    total = num_steps(len(sizes), loop)
    largest: list[int] = []
    for step in range(0, total, math.ceil(total / STEPS_LOOKED_AT)):
        batch = global_batch(len(sizes), step, loop)
        for members in pack_sizes([sizes[i] for i in batch], loop.token_budget, loop.micro_batch_size, keys=batch):
            found = [batch[member] for member in members]
            largest = max(largest, found, key=lambda items: sum(sizes[i] for i in items))
    return largest


def _judging(config: Config, policy: ModelSizes, forest: ForestSizes, beside: bool) -> Forecast:
    """The peak of judging, with the policy in memory too or without it."""
    alone = forecast_forward(scorer_sizes(config), forest, head_rows=0, stage="scores")
    if not beside:
        return alone
    return replace(
        alone,
        weights=alone.weights + policy.weight_bytes,
        quantisation_state=float(policy.quantisation_bytes),
        adapter=0.0 if policy.lora is None else 4.0 * policy.lora.parameters,
    )


def policy_stays(config: Config, memory: float | None = None) -> bool:
    """Whether the policy fits into memory beside the R-Scorer while it judges; else it has to be set aside."""
    room = device_memory(config) if memory is None else memory
    model = policy_sizes(config)
    one = ForestSizes.of(Forest.of([typical_tree(config, "scores", Lengths())]), model.device_type)
    forest = one.times(max(1, config.scorer.token_budget // one.tokens))
    return _judging(config, model, forest, True).fits(room)


# Out of memory ----------------------------------------------------------------------------------------------
