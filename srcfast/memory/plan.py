"""What a run will take, from its settings alone: each stage's peak memory, and what to change where it doesn't fit.

Stages are named as in the run directory: rationale, candidates, scores, preferences (its references), dpo, evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from srcfast.errors import OutOfMemory
from srcfast.generation.decode import IMAGES_AHEAD, PREFILL_TOKENS
from srcfast.memory.activations import ForestSizes
from srcfast.memory.checkpoint_shapes import checkpoint_shapes
from srcfast.memory.forecast import (
    Forecast,
    forecast_decoding,
    forecast_forward,
    forecast_training,
    least_checkpointing,
    most_that_fit,
)
from srcfast.memory.model_sizes import USABLE, ModelSizes, memory_of
from srcfast.models.embedded import checkpoint_directory
from srcfast.units import parse_bytes, show_bytes

TRAINING = ("rationale", "dpo")
DECODING = ("candidates", "evaluation")
STEPS_LOOKED_AT = 1000
STAGES = ("rationale", "candidates", "scores", "preferences", "dpo", "evaluation")
# What torch, its BLAS libraries and the operating system say.
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")


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
    return distributed.ranks_of_node() if distributed.size() > 1 else config.distributed.ranks or 1


def judge_sizes(config: Config) -> ModelSizes:
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
    alone = forecast_forward(judge_sizes(config), forest, head_rows=0, stage="scores")
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


# What to change ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A setting to change, and the stage's peak once it and those before it are changed."""

    setting: str
    value: Any
    forecast: Forecast

    def __str__(self) -> str:
        return f"{self.setting}={self.value} (forecast {show_bytes(self.forecast.peak)})"


def advice(
    config: Config,
    stage: str,
    *,
    memory: float,
    limit: float | None = None,
    lengths: Lengths = Lengths(),  # noqa: B008
) -> list[Change]:
    """What to change, in this order, until the stage fits; each on top of those before. Empty where it fits as it is.

    What costs least comes first. For training: recomputing activations, 4-bit weights, fewer tokens at once, an optimizer
    in 8 bits, one whose moments are paged out, weights in 16 bits, a base that the node's ranks share out, a lower rank.
    Fewer tokens, samples or beams are the largest number that fits; where not even the least does, the others come first.

    Args:
        memory: bytes that the device has.
        limit: bytes to fit into, where they are to be fewer.
        config, stage, lengths: as in `forecast_stage`.
    """
    limit = memory if limit is None else limit
    changes: list[Change] = []
    now = forecast_stage(config, stage, memory=memory, lengths=lengths)
    options, later = list(_options(config, stage)), []
    while options and not now.fits(limit):
        setting, value = options.pop(0)
        stated = value is not None
        if setting.endswith("activation_checkpointing"):
            value = "auto" if limit == memory else _least_recomputed(config, stage, memory, limit, lengths)
        elif not stated:
            value = largest_value(config, setting, stage, memory=memory, limit=limit, lengths=lengths)
        changed = with_setting(config, setting, value)
        then = forecast_stage(changed, stage, memory=memory, lengths=lengths)
        if not stated and not then.fits(limit) and setting not in later:
            later.append(setting)  # alone it is not enough: first what leaves room for more of it
            options.append((setting, None))
        elif then.peak < now.peak:
            changes.append(Change(setting, value, then))
            config, now = changed, then
    return changes


def _least_recomputed(config: Config, stage: str, memory: float, limit: float, lengths: Lengths) -> int:
    """The group of layers that "auto" would take for a device of `limit` bytes."""

    def peak(every: int) -> Forecast:
        changed = with_setting(config, f"{stage}.activation_checkpointing", every)
        return forecast_stage(changed, stage, memory=memory, lengths=lengths)

    return least_checkpointing(peak, policy_sizes(config).shapes.layers, limit)


def _options(config: Config, stage: str) -> Iterator[tuple[str, Any]]:
    """Settings and values to try, in order; None for the largest value that fits."""
    nf4 = [("model.quantize", "nf4")] if config.model.quantize == "none" else []
    half = [("model.dtype", "bfloat16")] if config.model.dtype == "float32" else []
    share = [("distributed.shard", True)] if node_ranks(config) > 1 and not config.distributed.shard else []
    if stage in TRAINING:
        yield f"{stage}.activation_checkpointing", "auto"
        yield from nf4
        yield "model.vision_offload", True
        yield f"{stage}.token_budget", None
        yield f"{stage}.optimizer", "adamw_8bit"
        yield f"{stage}.optimizer", "paged_adamw_8bit"
        yield from [*half, *share]
        r = config.lora.r
        while r > 8:
            r //= 2
            yield "lora.r", r
    elif stage == "scores":
        yield "scorer.token_budget", None
        if config.scorer.dtype == "float32":
            yield "scorer.dtype", "float16"
    elif stage == "preferences":
        yield "dpo.token_budget", None
        yield from [*nf4, *half, *share]
    else:
        yield f"{stage}.batch_size", None
        yield from nf4
        if stage == "candidates":
            yield "candidates.num_beams", None
        yield from [*half, *share]


def largest_value(
    config: Config,
    setting: str,
    stage: str,
    *,
    memory: float,
    limit: float | None = None,
    lengths: Lengths = Lengths(),  # noqa: B008
) -> int:
    """The largest token budget, batch or number of beams with which the stage fits; the least there is where none does."""

    def fits(value: int) -> bool:
        if setting.endswith("token_budget"):
            found = forecast_stage(config, stage, memory=memory, lengths=lengths, token_budget=value * 16)
        else:
            found = forecast_stage(with_setting(config, setting, value), stage, memory=memory, lengths=lengths)
        return found.fits(memory if limit is None else limit)

    if setting.endswith("token_budget"):
        tree = typical_tree(config, stage, lengths).num_tokens
        return max(16 * most_that_fit(fits, 1 << 20), tree)
    return max(1, most_that_fit(fits, 256 if setting.endswith("beams") else 1 << 12))


def with_setting(config: Config, setting: str, value: Any) -> Config:
    """The settings with one of them, `section.name`, changed."""
    section, _, name = setting.partition(".")
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})


# Out of memory ----------------------------------------------------------------------------------------------


@contextmanager
def out_of_memory_is_met(config: Config, stage: str) -> Iterator[None]:
    """Within: where memory runs out, the stage's forecast and what to change instead of a trace.

    Args:
        config: the run's settings.
        stage: one of `STAGES`, or a section of the settings that has a token budget.

    Raises:
        OutOfMemory: in place of torch's and Python's own errors.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_explanation(config, stage, error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is torch's, a GPU library's or the operating system's way to say that there is no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _NO_MEMORY)


def _explanation(config: Config, stage: str, error: BaseException) -> str:
    memory = device_memory(config)
    there = f"{show_bytes(memory)} on {config.model.device}" if math.isfinite(memory) else config.model.device
    detail = " ".join(str(error).split())[:200] or type(error).__name__
    stage = "candidates" if stage == "headroom" else stage
    if stage not in STAGES:
        return f"{stage}: expected to fit into {there}, found {detail}. Mend: lower {stage}.token_budget"
    forecast = forecast_stage(config, stage)
    # It did not fit, whatever was forecast: a fifth less at least.
    found = advice(config, stage, memory=memory, limit=min(memory, 0.8 * forecast.peak / USABLE))
    mend = "; then ".join(map(str, found)) or "a device with more memory, or a smaller model"
    return f"{stage}: expected a peak of {forecast.text()} in {there}, found {detail}. Mend: {mend}"
