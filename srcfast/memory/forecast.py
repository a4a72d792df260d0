"""Forecast of a stage's peak memory, and what follows from it: how much to recompute, and how many tokens fit.

A training step's peak is at the beginning of backward, where most activations are alive: in the head, in the last layer, which
is computed for the rows alone that the loss reads, or in the one below it, for all tokens:

    weights + quantisation state + adapter + gradients + optimizer + image features
        + activations (`activations.activation_bytes`) + max(head, MLP, attention)

The workspaces, for T tokens of which h meet the head, V vocabulary, n rows of logits at a time, and elements of b bytes:

    head        4 n V + b n D + b h D        logits, their product with the head, the rows that meet it
    MLP         b T (3 F + 2 D), or b (T (2 F + 4 D) + D F) where 4-bit weights are made whole for a product
    attention   b (T (2 D + 3 Q) + 2 K T') + 4 T Q, less b T (2 F + D): what the layer's MLP kept is free by then

The step's images are encoded before its forward pass, when no activations are alive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from srcfast.attention.padded import PART_BYTES
from srcfast.data.forest import Forest, Tree
from srcfast.generation.cuda_graphs import position_buckets, row_buckets
from srcfast.generation.kv_cache import Layout, cache_dtype
from srcfast.memory.activations import AttentionReads, ForestSizes, activation_bytes, fullest_forest
from srcfast.memory.model_sizes import USABLE, ModelSizes, Shapes, memory_for
from srcfast.models.protocols import HasDecoder
from srcfast.units import show_bytes
from srcfast_kernels.linear_logprob import CHUNK_ELEMENTS, COLUMNS, GPU_CHUNK_ELEMENTS, LEAST_CHUNK_ROWS

IMAGE_CACHE = 1 << 30  # bytes of encoded images kept, at most
IMAGES_AT_ONCE = 64  # that the vision tower encodes, at most
GRAPH_BYTES = 8 << 20  # of a captured step's nodes, beside the pool: generous for some thousand of them


@dataclass(frozen=True)
class Forecast:
    """A stage's peak, by what takes it; bytes.

    Attributes:
        stage: its name.
        weights: frozen, 4-bit codes included; of all models that are in memory.
        quantisation_state: the scales of 4-bit weights.
        adapter: its weights, in fp32.
        gradients: of the adapter.
        optimizer: moments on the device.
        image_features: encoded images that are kept.
        activations: kept between forward and backward.
        keys_and_values: the cache of decoding, as it is allocated.
        graphs: captured steps of decoding, and the pool of memory that they share.
        workspace: what is alive for a moment, at the peak.
        checkpoint_every: layers a group whose activations are recomputed; 0 keeps all.
    """

    stage: str
    weights: float = 0.0
    quantisation_state: float = 0.0
    adapter: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    image_features: float = 0.0
    activations: float = 0.0
    keys_and_values: float = 0.0
    graphs: float = 0.0
    workspace: float = 0.0
    checkpoint_every: int = 0

    @property
    def parts(self) -> dict[str, float]:
        """What takes memory, in bytes."""
        others = ("stage", "checkpoint_every")
        return {name: value for name, value in asdict(self).items() if name not in others and value}

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def counted(self) -> float:
        """What can be counted on a CPU, too: weights, gradients, the optimizer's state, what is kept for backward."""
        weights = self.weights + self.quantisation_state + self.adapter
        return weights + self.gradients + self.optimizer + self.activations

    def fits(self, memory: float) -> bool:
        """Whether it fits into `memory` bytes, a tenth of them left alone."""
        return self.peak <= USABLE * memory

    def text(self) -> str:
        """`11.2 GiB (weights 4.2 GiB, activations 3.9 GiB, ...)`, the largest first."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        named = ", ".join(f"{name.replace('_', ' ')} {show_bytes(value)}" for name, value in parts)
        return f"{show_bytes(self.peak)} ({named})"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "stage": self.stage,
            "peak_bytes": round(self.peak),
            "parts": {name: round(value) for name, value in self.parts.items()},
            "checkpoint_every": self.checkpoint_every,
        }


def forecast_training(
    model: ModelSizes,
    forest: ForestSizes,
    *,
    optimizer: str = "adamw",
    checkpoint_every: int = 0,
    memory: float | None = None,
    images: int | None = None,
    images_a_step: int = 0,
    stage: str = "training",
) -> Forecast:
    """The peak of LoRA training on forests like this one.

    Args:
        model: with its adapter.
        forest: the fullest that will be run.
        optimizer: as `TrainingConfig` names it.
        checkpoint_every: layers a group whose activations are recomputed; 0 for none.
        memory: of the device, which decides how many images are kept and encoded at once; None: as many as ever.
        images: distinct ones; None: more than are kept.
        images_a_step: at most, all of which are in memory during the step.
        stage: a name for the result.
    """
    parameters = 0 if model.lora is None else model.lora.parameters
    base = model.trained * model.dtype_bytes  # a base that is trained itself has gradients and moments of its own dtype
    kept = activation_bytes(model, forest, checkpoint_every)
    features, encoding = _image_bytes(model, memory, images, images_a_step)
    in_last = _backward_bytes(model, forest.last.queries, forest.last)
    during = max(
        kept.at_the_head + max(_head_bytes(model, forest.head_rows, True), in_last),
        kept.below + _backward_bytes(model, forest.tokens, forest.every),
    )
    during += forest.every.plan_bytes + forest.last.plan_bytes + model.gathered_bytes
    return Forecast(
        stage=stage,
        weights=float(model.weight_bytes),
        quantisation_state=float(model.quantisation_bytes),
        adapter=4.0 * parameters,
        gradients=4.0 * parameters + base,
        optimizer=moment_bytes(optimizer, parameters, model.device_type)
        + moment_bytes(optimizer, model.trained, model.device_type, model.dtype_bytes),
        image_features=features,
        activations=kept.most,
        workspace=max(during, encoding) - kept.most,
        checkpoint_every=checkpoint_every,
    )


def forecast_forward(
    model: ModelSizes,
    forest: ForestSizes,
    *,
    head_rows: int | None = None,
    memory: float | None = None,
    images: int | None = None,
    stage: str,
) -> Forecast:
    """The peak of forward passes without gradients on forests like this one: references, judging.

    Args:
        head_rows: that meet the whole vocabulary; None: those of the forest.
        model, forest, memory, images, stage: as for training.
    """
    features, encoding = _image_bytes(model, memory, images)
    rows = forest.head_rows if head_rows is None else head_rows
    row = forest.tokens * model.shapes.hidden * model.dtype_bytes
    return _inference(
        model, stage, features, max(_forward_bytes(model, forest), row + _head_bytes(model, rows, False), encoding)
    )


def forecast_decoding(
    model: ModelSizes,
    prefill: ForestSizes,
    *,
    samples: int,
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    graphs: bool = False,
    memory: float | None = None,
    images: int | None = None,
    images_a_step: int = 0,
    stage: str,
) -> Forecast:
    """The peak of decoding: each sample's prompt is kept once, each row's continuation on its own.

    A GPU's cache is allocated whole. Captured steps take one step's workspace in a pool of their own, which nothing else can
    use, beside the one of the steps that run as they are.

    Args:
        prefill: the forest of the prompts that are run together.
        samples: decoded together.
        rows: a sample (beams times proposals; 1 for greedy answers).
        prompt_tokens: of the longest prompt.
        new_tokens: most positions that a row keeps behind its prompt.
        graphs: steps are captured, which they are on a GPU alone.
        model, memory, images, images_a_step, stage: as for training.
    """
    shapes, on_gpu = model.shapes, model.device_type == "cuda"
    features, encoding = _image_bytes(model, memory, images, images_a_step)
    graphs = graphs and on_gpu
    layout = Layout.of(samples, rows, prompt_tokens, new_tokens, on_gpu=on_gpu, spare=graphs)
    position = 2.0 * shapes.layers * shapes.key * _cache_bytes(model)
    step, captured = _step_bytes(model, layout), 0.0
    if graphs:
        count = len(row_buckets(samples * rows)) * len(position_buckets(layout.row_capacity))
        captured = step + count * GRAPH_BYTES
    # A CPU's cache grows: of its four tensors one is there twice for a moment.
    growing = 0.0 if on_gpu else position / 2 * max(samples * layout.prompt_capacity, layout.rows * layout.row_capacity)
    # fp32 weights are folded with their adapter into a copy.
    folds = model.dtype_bytes == 4 and not model.quantised and model.lora is not None and not model.gathered_bytes
    folded = 4.0 * shapes.linear_weights if folds else 0.0
    found = _inference(model, stage, features, folded + max(step, _forward_bytes(model, prefill), encoding, growing))
    return replace(found, keys_and_values=position * layout.positions, graphs=captured)


def _cache_bytes(model: ModelSizes) -> int:
    """Of a number in decoding's cache."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[model.dtype_bytes]
    return cache_dtype(dtype, model.device_type).itemsize


def _step_bytes(model: ModelSizes, layout: Layout) -> float:
    """Of a decoding step with all of its rows: drawing tokens, one layer's attention, or its MLP."""
    shapes, width, rows = model.shapes, model.dtype_bytes, layout.slots * layout.width
    # Logits; probabilities and their order; sums of them, and what is drawn from; or, while they are sorted, the sort's own.
    sampling = rows * shapes.vocabulary * (4 * 6 + 8)
    seen = layout.prompt_capacity + layout.row_capacity
    attention = rows * shapes.heads * seen * 4 * 2  # scores and their softmax
    masks = 4 * rows * layout.row_capacity
    whole = shapes.hidden * shapes.intermediate * width if model.quantised else 0
    mlp = rows * width * (3 * shapes.intermediate + 3 * shapes.hidden) + whole
    return float(masks + max(sampling, attention, mlp))


def moment_bytes(optimizer: str, parameters: int, device_type: str, width: int = 4) -> float:
    """AdamW's two moments: of `width` bytes, or 8 bits with an fp32 scale for 256; paged ones leave a GPU where they must."""
    if optimizer.startswith("paged") and device_type == "cuda":
        return 0.0
    return parameters * 2 * (1 + 4 / 256) if optimizer.endswith("8bit") else parameters * 2.0 * width


def _inference(model: ModelSizes, stage: str, features: float, workspace: float) -> Forecast:
    return Forecast(
        stage=stage,
        weights=float(model.weight_bytes),
        quantisation_state=float(model.quantisation_bytes),
        adapter=0.0 if model.lora is None else 4.0 * model.lora.parameters,
        image_features=features,
        workspace=workspace + model.gathered_bytes,
    )


# Workspaces -------------------------------------------------------------------------------------------------


def _head_bytes(model: ModelSizes, rows: float, differentiated: bool) -> float:
    shapes, width = model.shapes, model.dtype_bytes
    if not rows:
        return 0.0
    if model.device_type == "cuda":
        chunk = max(1, GPU_CHUNK_ELEMENTS // shapes.vocabulary)
    else:
        chunk = max(LEAST_CHUNK_ROWS, CHUNK_ELEMENTS // shapes.vocabulary)
    taken = min(rows, chunk)
    product = taken * shapes.hidden * width if differentiated else 0
    if model.device_type == "cpu":  # makes some columns at a time, of a head in fp32
        columns = min(shapes.vocabulary, COLUMNS)
        widened = 4 * (taken + columns) * shapes.hidden if width == 2 else 0
        product = max(product, 4 * taken * columns + widened)
    if model.trained:  # the head's own gradient
        product += shapes.vocabulary * shapes.hidden * width
    return 4.0 * taken * shapes.vocabulary + product + rows * shapes.hidden * width


def _backward_bytes(model: ModelSizes, rows: float, reads: AttentionReads) -> float:
    """Of a layer that is computed for `rows`: its MLP, the norm and weights before it, or its attention."""
    shapes, width = model.shapes, model.dtype_bytes
    whole = shapes.hidden * shapes.intermediate * width if model.quantised or model.trained else 0
    gated = 3 if model.device_type == "cuda" else 4  # its gradients come from one kernel, or from several operations
    mlp = width * rows * (gated * shapes.intermediate + 2 * shapes.hidden)
    inputs = width * rows * (2 * shapes.intermediate + 4 * shapes.hidden) + whole
    attention: float = width * (rows * (2 * shapes.hidden + 3 * shapes.query) + 2 * reads.keys * shapes.key)
    if model.device_type == "cuda":
        attention += 4 * rows * shapes.query  # FlashAttention sums the queries' gradient in fp32
    elif reads.groups:
        attention = width * rows * 2 * shapes.hidden + 4 * (rows * shapes.query + 2 * reads.keys * shapes.key)
        attention += 2 * 4 * shapes.query * sum(blocks * long for blocks, long, _ in reads.groups)
        attention += 3 * max(_part_bytes(shapes, *group) for group in reads.groups)
    attention -= width * rows * (2 * shapes.intermediate + shapes.hidden)  # what the MLP kept is free by then
    return float(max(mlp, inputs, attention))


def _part_bytes(shapes: Shapes, blocks: float, long: int, wide: int) -> float:
    """The scores of a padded group that are alive at a time on a CPU: at least those of one block under one head of keys."""
    least = 4.0 * (shapes.heads // shapes.kv_heads) * long * wide
    return min(blocks * shapes.kv_heads * least, max(PART_BYTES, least))


def _forward_bytes(model: ModelSizes, forest: ForestSizes) -> float:
    """Of a layer without gradients: its MLP, or its attention."""
    shapes, width, tokens = model.shapes, model.dtype_bytes, forest.tokens
    whole = shapes.hidden * shapes.intermediate * width if model.quantised else 0
    mlp = width * tokens * (3 * shapes.hidden + 3 * shapes.intermediate) + whole
    attention = width * (tokens * (2 * shapes.hidden + 3 * shapes.query) + 2 * forest.every.keys * shapes.key)
    return float(max(mlp, attention))


def _image_bytes(
    model: ModelSizes, memory: float | None, images: int | None, images_a_step: int = 0
) -> tuple[float, float]:
    """(features that are kept, workspace of encoding some images at once)."""
    if model.vision is None or images == 0:
        return 0.0, 0.0
    every = math.inf if images is None else images
    one = model.vision.image_tokens * model.shapes.hidden * model.dtype_bytes
    features = min(every * one, max(image_cache(memory), images_a_step * one))
    encoding = model.waiting_bytes + min(every, images_at_once(model, memory)) * _encoding_bytes(model)
    return features, encoding


def _encoding_bytes(model: ModelSizes) -> float:
    """Of an image in the vision tower: an MLP's activation function, or attention, of one layer."""
    vision = model.vision
    assert vision is not None
    widths = 4 * vision.hidden + max(3 * vision.intermediate, 4 * vision.hidden)
    return float(model.dtype_bytes * vision.patches * widths)


def image_cache(memory: float | None) -> int:
    """Bytes of encoded images to keep on a device of this memory."""
    return IMAGE_CACHE if memory is None else int(min(IMAGE_CACHE, memory / 32))


def images_at_once(model: ModelSizes, memory: float | None) -> int:
    """Images to encode together on a device of this memory: at most a sixteenth of it goes there."""
    if memory is None or model.vision is None:
        return IMAGES_AT_ONCE
    return max(1, int(min(IMAGES_AT_ONCE, memory / 16 / _encoding_bytes(model))))


# What follows -----------------------------------------------------------------------------------------------


def plan_checkpointing(
    model: HasDecoder,
    trees: Sequence[Tree],
    *,
    token_budget: int,
    micro_batch_size: int,
    optimizer: str = "adamw",
    images_a_step: int = 0,
    memory: float | None = None,
) -> int:
    """Layers a group whose activations are recomputed in backward: 0 if all fit, else what recomputes least and fits.

    Args:
        model: a model with its adapter.
        trees: what is trained on; the fullest forest that the next two let them make is what has to fit.
        token_budget: most tokens in a forest.
        micro_batch_size: most trees in a forest.
        optimizer: as `TrainingConfig` names it.
        images_a_step: at most, all of which are in memory during the step.
        memory: bytes to fit into; None: what `memory_for` the model says.
    """
    room = memory_for(model) if memory is None else memory
    sizes = ModelSizes.of(model)
    forest = fullest_sizes(trees, token_budget, micro_batch_size, sizes.device_type)

    def peak(every: int) -> Forecast:
        return forecast_training(
            sizes, forest, optimizer=optimizer, checkpoint_every=every, memory=room, images_a_step=images_a_step
        )

    return least_checkpointing(peak, sizes.shapes.layers, room)


def least_checkpointing(forecast: Callable[[int], Forecast], layers: int, memory: float) -> int:
    """The group of layers that recomputes least of those whose forecast fits; the leanest where none does.

    All groups but the last are run again. So two halves recompute half of the layers and keep half of the activations;
    smaller groups recompute more and keep less, down to where the groups' inputs weigh more than what a group keeps.
    """
    peaks = {every: forecast(every) for every in range(layers)}
    fitting = [every for every, found in peaks.items() if found.fits(memory)]
    if not fitting:
        return min(peaks, key=lambda every: peaks[every].peak)
    return min(fitting, key=lambda every: (recomputed_layers(layers, every), peaks[every].peak))


def recomputed_layers(layers: int, every: int) -> int:
    """How many layers are run again with groups of `every`: all but those of the last group."""
    return (math.ceil(layers / every) - 1) * every if every else 0


def fullest_sizes(trees: Sequence[Tree], token_budget: int, max_trees: int, device_type: str) -> ForestSizes:
    """Sizes of the fullest forest that these trees can make under both limits."""
    members = fullest_forest([tree.num_tokens for tree in trees], token_budget, max_trees)
    return ForestSizes.of(Forest.of([trees[index] for index in members]), device_type)


def most_that_fit(fits: Callable[[int], bool], limit: int = 1 << 24) -> int:
    """The largest number from 1 to `limit` for which `fits` holds, by bisection; 0 where not even 1 does."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
