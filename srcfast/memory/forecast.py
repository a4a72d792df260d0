"""Forecast a stage's peak memory; choose by it how much to recompute.

A training step's peak is at the beginning of backward, when most activations are alive: in the head, in the last layer, which
is computed only for the rows that the loss reads, or in the layer before it, which is computed for all tokens:

    weights + quantisation state + adapter + gradients + optimizer + image features
        + activations (`activations.activation_bytes`) + max(head, MLP, attention)

The workspaces, for T tokens, h rows multiplied by the head, V vocabulary, n rows of logits at a time, and elements of b bytes:

    head        4 n V + b n D + b h D        logits, their product with the head, the head's input rows
    MLP         b T (3 F + 2 D), or b (T (2 F + 4 D) + D F) where 4-bit weights are dequantised for a product
    attention   b (T (2 D + 3 Q) + 2 K T') + 4 T Q, less b T (2 F + D): what the layer's MLP saved is freed by then

The step's images are encoded before its forward pass, when no activations are alive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from srcfast.attention.padded import CHUNK_BYTES
from srcfast.config.settings import TrainingConfig
from srcfast.data.forest import Forest, Tree
from srcfast.generation.cuda_graphs import position_buckets, row_buckets
from srcfast.generation.kv_store import Layout, cache_dtype
from srcfast.memory.activations import AttentionReads, ForestSizes, activation_bytes, fullest_forest
from srcfast.memory.model_sizes import USABLE, ModelSizes, Shapes, memory_for
from srcfast.models.protocols import HasDecoder
from srcfast.units import show_bytes
from srcfast_kernels.linear_logprob import CHUNK_ELEMENTS, COLUMNS, GPU_CHUNK_ELEMENTS, LEAST_CHUNK_ROWS

IMAGE_CACHE = 1 << 30  # maximum bytes of cached image features
IMAGES_AT_ONCE = 64  # maximum of images that the vision tower encodes at once
GRAPH_BYTES = 8 << 20  # of a captured step's nodes, without the pool: ample for some thousand nodes


@dataclass(frozen=True)
class Forecast:
    """A stage's peak by its parts, in bytes.

    Attributes:
        stage: the stage's name.
        weights: frozen weights, 4-bit codes included, of all models in memory.
        quantisation_state: the scales of 4-bit weights.
        adapter: the adapter's weights, in fp32.
        gradients: the adapter's gradients.
        optimizer: moments on the device.
        image_features: cached features of encoded images.
        activations: saved between forward and backward.
        keys_and_values: the cache of decoding, as it is allocated.
        states: of recurrent layers in decoding.
        graphs: captured steps of decoding, and the pool of memory that they share.
        workspace: temporary memory at the peak.
        checkpoint_every: layers of a group whose activations are recomputed; 0 saves all activations.
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
    states: float = 0.0
    graphs: float = 0.0
    workspace: float = 0.0
    checkpoint_every: int = 0

    @property
    def parts(self) -> dict[str, float]:
        """Return the parts that are not 0, in bytes."""
        others = ("stage", "checkpoint_every")
        return {name: value for name, value in asdict(self).items() if name not in others and value}

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def counted(self) -> float:
        """Return what can also be counted on a CPU: weights, gradients, the optimizer's state, saved activations."""
        weights = self.weights + self.quantisation_state + self.adapter
        return weights + self.gradients + self.optimizer + self.activations

    def fits(self, memory: float) -> bool:
        """Return whether the peak fits into the usable share of `memory` bytes."""
        return self.peak <= USABLE * memory

    def text(self) -> str:
        """Write it as `11.2 GiB (weights 4.2 GiB, activations 3.9 GiB, ...)`, the largest part first."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        named = ", ".join(f"{name.replace('_', ' ')} {show_bytes(value)}" for name, value in parts)
        return f"{show_bytes(self.peak)} ({named})"

    def to_json(self) -> dict[str, Any]:
        """Convert to plain JSON values."""
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
    """Forecast the peak of LoRA training on forests like this one.

    Args:
        model: sizes of the model with its adapter.
        forest: sizes of the fullest forest.
        optimizer: as `TrainingConfig` names it.
        checkpoint_every: layers of a group whose activations are recomputed; 0 for none.
        memory: bytes of the device, by which images are cached and encoded at once; None: the upper limits.
        images: number of distinct images; None: more than are cached.
        images_a_step: maximum of images in a step, whose features are all in memory during it.
        stage: name of the forecast.
    """
    parameters = 0 if model.lora is None else model.lora.parameters
    base = model.trained * model.dtype_bytes  # a trained base has gradients and moments in its dtype
    saved = activation_bytes(model, forest, checkpoint_every)
    features, encoding = _image_bytes(model, memory, images, images_a_step)
    in_last = _backward_bytes(model, forest.last.queries, forest.last)
    during = max(
        saved.at_the_head + max(_head_bytes(model, forest.head_rows, True), in_last),
        saved.below + _backward_bytes(model, forest.tokens, forest.inner),
    )
    during += forest.inner.plan_bytes + forest.last.plan_bytes + model.gathered_bytes
    return replace(
        _inference(model, stage, features, 0.0),
        gradients=4.0 * parameters + base,
        optimizer=moment_bytes(optimizer, parameters, model.device_type)
        + moment_bytes(optimizer, model.trained, model.device_type, model.dtype_bytes),
        activations=saved.peak,
        workspace=max(during, encoding) - saved.peak,
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
    """Forecast the peak of forward passes without gradients on forests like this one: references, judging.

    Args:
        head_rows: rows whose logits over the whole vocabulary are computed; None: those of the forest.
        model, forest, memory, images, stage: as in `forecast_training`.
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
    """Forecast the peak of decoding.

    Each sample's prompt is stored once, each row's continuation for itself. A GPU's cache is allocated at once. Captured steps
    take one step's workspace in a pool that nothing else can use, in addition to that of the steps that are not captured.

    Args:
        prefill: sizes of the forest of the prompts that are run together.
        samples: number of samples decoded together.
        rows: number of rows of a sample (beams times proposals; 1 for greedy answers).
        prompt_tokens: length of the longest prompt.
        new_tokens: maximum of positions that a row has behind its prompt.
        graphs: whether steps are captured; on a CPU they never are.
        model, memory, images, images_a_step, stage: as in `forecast_training`.
    """
    shapes, on_gpu = model.shapes, model.device_type == "cuda"
    features, encoding = _image_bytes(model, memory, images, images_a_step)
    graphs = graphs and on_gpu and not model.state_bytes  # recurrent layers decode without
    layout = Layout.of(samples, rows, prompt_tokens, new_tokens, on_gpu=on_gpu, spare=graphs)
    position = 2.0 * shapes.attention_layers * shapes.key * _cache_bytes(model)
    states = model.state_bytes * layout.slots * (1 + layout.width)  # of each prompt, and of each row
    step, captured = _step_bytes(model, layout), 0.0
    if graphs:
        count = len(row_buckets(samples * rows)) * len(position_buckets(layout.row_capacity))
        captured = step + count * GRAPH_BYTES
    # A CPU's cache grows: one of its four tensors at a time is there twice.
    growing = 0.0 if on_gpu else position / 2 * max(samples * layout.prompt_capacity, layout.rows * layout.row_capacity)
    # The adapter is folded into a copy of fp32 weights.
    folds = model.dtype_bytes == 4 and not model.quantised and model.lora is not None and not model.gathered_bytes
    folded = 4.0 * shapes.linear_weights if folds else 0.0
    forecast = _inference(model, stage, features, folded + max(step, _forward_bytes(model, prefill), encoding, growing))
    return replace(forecast, keys_and_values=position * layout.positions, states=states, graphs=captured)


def _cache_bytes(model: ModelSizes) -> int:
    """Return the bytes of a number in decoding's cache."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[model.dtype_bytes]
    return cache_dtype(dtype, model.device_type).itemsize


def _step_bytes(model: ModelSizes, layout: Layout) -> float:
    """Count a decoding step's workspace with all of its rows: of sampling, a layer's attention, or its MLP."""
    shapes, width, rows = model.shapes, model.dtype_bytes, layout.slots * layout.width
    # Logits, sorted probabilities and their order, cumulative sums and the nucleus; while sorting, the sort's workspace instead.
    sampling = rows * shapes.vocabulary * (4 * 6 + 8)
    keys = layout.prompt_capacity + layout.row_capacity
    attention = rows * shapes.heads * keys * 4 * 2  # scores and their softmax
    masks = 4 * rows * layout.row_capacity
    whole = shapes.hidden * shapes.intermediate * width if model.quantised else 0
    mlp = rows * width * (3 * shapes.intermediate + 3 * shapes.hidden) + whole
    recurrent = shapes.layers - shapes.attention_layers
    # A layer's states of the rows, what follows from them, and a product of the same size.
    mixing = 3 * rows * model.state_bytes / recurrent if recurrent else 0
    return float(masks + max(sampling, attention, mlp, mixing))


def moment_bytes(optimizer: str, parameters: int, device_type: str, width: int = 4) -> float:
    """Count AdamW's two moments: of `width` bytes, or 8 bits with an fp32 scale for each 256; 0 for paged ones of a GPU."""
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
    """Count the head's workspace for its input rows, by chunks of logits."""
    shapes, width = model.shapes, model.dtype_bytes
    if not rows:
        return 0.0
    if model.device_type == "cuda":
        chunk = max(1, GPU_CHUNK_ELEMENTS // shapes.vocabulary)
    else:
        chunk = max(LEAST_CHUNK_ROWS, CHUNK_ELEMENTS // shapes.vocabulary)
    chunk_rows = min(rows, chunk)
    product = chunk_rows * shapes.hidden * width if differentiated else 0
    if model.device_type == "cpu":  # it computes some columns at a time, with the head in fp32
        columns = min(shapes.vocabulary, COLUMNS)
        widened = 4 * (chunk_rows + columns) * shapes.hidden if width == 2 else 0
        product = max(product, 4 * chunk_rows * columns + widened)
    if model.trained:  # the head's gradient
        product += shapes.vocabulary * shapes.hidden * width
    return 4.0 * chunk_rows * shapes.vocabulary + product + rows * shapes.hidden * width


def _backward_bytes(model: ModelSizes, rows: float, reads: AttentionReads) -> float:
    """Count a layer's workspace in backward, computed for `rows`: its MLP, the MLP's norm and inputs, or its attention."""
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
        attention += 3 * max(_scores_bytes(shapes, *group) for group in reads.groups)
    attention -= width * rows * (2 * shapes.intermediate + shapes.hidden)  # what the MLP saved is freed by then
    return float(max(mlp, inputs, attention))


def _scores_bytes(shapes: Shapes, blocks: float, long: int, wide: int) -> float:
    """Count the scores of a padded group that are alive at a time on a CPU: at least one block's under one head of keys."""
    minimum = 4.0 * (shapes.heads // shapes.kv_heads) * long * wide
    return min(blocks * shapes.kv_heads * minimum, max(CHUNK_BYTES, minimum))


def _forward_bytes(model: ModelSizes, forest: ForestSizes) -> float:
    """Count a layer's workspace without gradients: of its MLP, or its attention."""
    shapes, width, tokens = model.shapes, model.dtype_bytes, forest.tokens
    whole = shapes.hidden * shapes.intermediate * width if model.quantised else 0
    mlp = width * tokens * (3 * shapes.hidden + 3 * shapes.intermediate) + whole
    attention = width * (tokens * (2 * shapes.hidden + 3 * shapes.query) + 2 * forest.inner.keys * shapes.key)
    return float(max(mlp, attention))


def _image_bytes(
    model: ModelSizes, memory: float | None, images: int | None, images_a_step: int = 0
) -> tuple[float, float]:
    """Count the cached features, and the workspace of encoding some images at once."""
    if model.vision is None or images == 0:
        return 0.0, 0.0
    count = math.inf if images is None else images
    image = model.vision.image_tokens * model.vision.vectors * model.shapes.hidden * model.dtype_bytes
    if model.adapted_layers is not None:  # what the projector embeds is cached, or what enters a layer of the tower
        image = model.vision.patches * model.vision.hidden * model.dtype_bytes
    features = min(count * image, max(image_cache(memory), images_a_step * image))
    encoding = model.waiting_bytes + min(count, images_at_once(model, memory)) * _encoding_bytes(model)
    return features, encoding


def _encoding_bytes(model: ModelSizes) -> float:
    """Count an image's workspace in the vision tower: of one layer's activation function, or its attention."""
    vision = model.vision
    assert vision is not None
    widths = 4 * vision.hidden + max(3 * vision.intermediate, 4 * vision.hidden)
    return float(model.dtype_bytes * vision.patches * widths)


def image_cache(memory: float | None) -> int:
    """Return the bytes of image features to cache on a device of `memory` bytes."""
    return IMAGE_CACHE if memory is None else int(min(IMAGE_CACHE, memory / 32))


def images_at_once(model: ModelSizes, memory: float | None) -> int:
    """Return the number of images to encode at once: they take at most a sixteenth of the device's memory."""
    if memory is None or model.vision is None:
        return IMAGES_AT_ONCE
    return max(1, int(min(IMAGES_AT_ONCE, memory / 16 / _encoding_bytes(model))))


# Checkpointing ----------------------------------------------------------------------------------------------


def plan_checkpointing(
    model: HasDecoder,
    trees: Sequence[Tree],
    settings: TrainingConfig,
    memory: float | None = None,
) -> int:
    """Choose the layers of a group whose activations are recomputed: 0 if all fit, else what fits and recomputes least.

    Args:
        model: a model with its adapter.
        trees: the training's trees, of which the fullest forest within the settings' limits has to fit.
        settings: of the training; all features of a global batch's images are in memory during its step.
        memory: bytes to fit into; None: `memory_for` the model.
    """
    memory = memory_for(model) if memory is None else memory
    sizes = ModelSizes.of(model)
    forest = fullest_sizes(trees, settings.token_budget, settings.micro_batch_size, sizes.device_type)

    def peak(every: int) -> Forecast:
        return forecast_training(
            sizes,
            forest,
            optimizer=settings.optimizer,
            checkpoint_every=every,
            memory=memory,
            images_a_step=settings.global_batch_size,
        )

    return least_checkpointing(peak, sizes.shapes.layers, memory)


def least_checkpointing(forecast: Callable[[int], Forecast], layers: int, memory: float) -> int:
    """Choose the layers of a group that recompute least and fit by the forecast; the lowest peak if none fits.

    All groups but the last are recomputed. So two halves recompute half of the layers and save half of the activations;
    smaller groups recompute more and save less, until the groups' inputs take more than a group's activations.
    """
    peaks = {every: forecast(every) for every in range(layers)}
    fitting = [every for every, peak in peaks.items() if peak.fits(memory)]
    if not fitting:
        return min(peaks, key=lambda every: peaks[every].peak)
    return min(fitting, key=lambda every: (recomputed_layers(layers, every), peaks[every].peak))


def recomputed_layers(layers: int, every: int) -> int:
    """Count the layers that are recomputed with groups of `every`: all but those of the last group."""
    return (math.ceil(layers / every) - 1) * every if every else 0


def fullest_sizes(trees: Sequence[Tree], token_budget: int, max_trees: int, device_type: str) -> ForestSizes:
    """Return the sizes of the fullest forest of these trees within both limits."""
    members = fullest_forest([tree.num_tokens for tree in trees], token_budget, max_trees)
    return ForestSizes.of(Forest.of([trees[index] for index in members]), device_type)


def largest_fitting(fits: Callable[[int], bool], limit: int = 1 << 24) -> int:
    """Find the largest number from 1 to `limit` for which `fits` holds, by bisection; 0 if it does not hold for 1."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, min(2 * high, limit + 1)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
