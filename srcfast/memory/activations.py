"""Bytes that a training pass saves between forward and backward, counted from shapes as the autograd functions save them.

With b bytes an element, D hidden size, Q and K the widths of queries and keys, F the MLP's, r the rank, H heads, and T tokens,
a layer whose linears are all adapted saves

    b T (2 D + 2 F + 7 r) + 8 T              the inputs of its norms, gate and up, each adapter's low-rank activation;
                                             for each norm a number a token
    b (2 Q T + 2 K T') + 4 H T               attention on a GPU: queries, result, the T' >= T keys and values it reads

and in 16 bits its adapters as they are cast. The last layer has queries, and all that follows from them, for the M rows alone
that the loss reads. The pass as a whole saves b (2 M D + h D): the final norm's input and output, and the unit gradients of
the h rows that are multiplied by the head. Logits are not saved, nor what a layer can recompute from the above (normalised
inputs, the gated product). On a CPU attention saves queries, keys and values unchanged.

Adapters on the projector, and on layers of the vision tower, save what `adapted_image_bytes` says of an image; there are at most
as many images as their positions fit into T.

With checkpointing of groups of n layers only the groups' inputs are saved, and in addition the last group's activations, or
one group's while it is recomputed, whichever is more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srcfast.attention.padded_plan import plan_blocks
from srcfast.attention.varlen_plan import varlen_plan
from srcfast.data.forest import Forest
from srcfast.data.logit_rows import response_logit_rows
from srcfast.memory.flops import attended_in, tokens_below_roots
from srcfast.memory.model_sizes import ModelSizes

# What a gated DeltaNet saves, of the size of its values in fp32: 20.6 to 22.7 in 16 bits and 23.9 to 30.6 in fp32 were measured,
# for 1 to 8 heads of 64 and 128. Kernels of flash-linear-attention save less.
MIXER_COPIES = {2: 23.0, 4: 31.0}
# Linears that share an input, those of attention first. The last layer's queries have another input than its keys.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class AttentionReads:
    """Rows that attention reads in a layer.

    Attributes:
        queries: rows of queries.
        keys: rows of keys and values that variable-length attention reads: all tokens, or more where prefixes are copied.
        groups: (blocks, queries, keys) of each group of the CPU's padded attention; empty for a GPU.
    """

    queries: float
    keys: float
    groups: tuple[tuple[float, int, int], ...]

    @classmethod
    def of(cls, forest: Forest, device_type: str, rows: Tensor | None = None) -> AttentionReads:
        """Count for all tokens of a forest on the host, or for the queries of some rows."""
        queries = forest.num_tokens if rows is None else len(rows)
        if device_type == "cpu":
            planned = plan_blocks(forest, torch.float32, torch.device("cpu"), rows)[-1]
            return cls(queries, forest.num_tokens, tuple((blocks, long, wide) for blocks, long, wide, _ in planned))
        copies = varlen_plan(forest, rows).copies
        return cls(queries, forest.num_tokens if copies is None else len(copies.index), ())

    @property
    def plan_bytes(self) -> float:
        """Return the bytes of the CPU's masks and index maps."""
        return sum(blocks * (4 * long * wide + 8 * (long + wide)) for blocks, long, wide in self.groups)

    def times(self, count: float) -> AttentionReads:
        """Scale to `count` times as many trees."""
        groups = tuple((blocks * count, long, wide) for blocks, long, wide in self.groups)
        return AttentionReads(self.queries * count, self.keys * count, groups)


@dataclass(frozen=True)
class ForestSizes:
    """The sizes of a forest on which memory and time depend.

    Attributes:
        tokens: number of tokens.
        head_rows: positions whose log-probabilities are computed: all but the trees' roots.
        attended: sum over all queries of the keys that each sees.
        inner: what attention reads in each layer but the last.
        last: what attention reads in the last layer.
    """

    tokens: float
    head_rows: float
    attended: float
    inner: AttentionReads
    last: AttentionReads

    @classmethod
    def of(cls, forest: Forest, device_type: str) -> ForestSizes:
        """Count for a forest on "cuda" or "cpu"."""
        host = forest.host or forest
        inner = AttentionReads.of(host, device_type)
        rows = response_logit_rows(host)
        last = AttentionReads.of(host, device_type, rows) if len(rows) else inner
        return cls(host.num_tokens, tokens_below_roots(host), attended_in(host), inner, last)

    def times(self, count: float) -> ForestSizes:
        """Scale to `count` times as many trees of the same kind; fractions are allowed."""
        return ForestSizes(
            self.tokens * count,
            self.head_rows * count,
            self.attended * count,
            self.inner.times(count),
            self.last.times(count),
        )


@dataclass(frozen=True)
class SavedActivations:
    """Bytes saved for backward: when the loss has been computed, and when backward has passed the last layer."""

    at_the_head: float
    below: float

    @property
    def peak(self) -> float:
        return max(self.at_the_head, self.below)


def activation_bytes(model: ModelSizes, forest: ForestSizes, checkpoint_every: int = 0) -> SavedActivations:
    """Count the bytes that a forward pass of LoRA training saves for its backward pass.

    Args:
        model: sizes of a model with an adapter.
        forest: sizes of the forest, whose last layer is computed only for the rows that the loss reads.
        checkpoint_every: layers of a group whose activations are recomputed; 0 saves all activations.
    """
    shapes, width, count = model.shapes, model.dtype_bytes, model.shapes.layers
    row = forest.tokens * shapes.hidden * width
    layer, last = (layer_bytes(model, forest.tokens, reads) for reads in (forest.inner, forest.last))
    largest = layer
    plain, grouped = model.layer_factor == 1.0, model.recomputes_groups
    if not plain:
        attention = model.layer_factor * layer
        mixers = count - shapes.attention_layers
        if mixers and model.mixer_values:
            others = layer - _attention_bytes(model, forest.inner)
            recurrent = model.layer_factor * others + mixer_bytes(model, forest.tokens)
        else:  # a short convolution saves less than attention
            recurrent = attention
        layer = last = (shapes.attention_layers * attention + mixers * recurrent) / count
        largest = max(attention, recurrent)
    shared = 2 * forest.tokens * shapes.head_dim * width  # cosines and sines
    rows = forest.last.queries
    head = 2 * rows * shapes.hidden * width + 4 * rows
    head += forest.head_rows * (shapes.hidden * width + 2 * 8)  # rows and slots are int64
    every = checkpoint_every or count
    groups = math.ceil(count / every)
    tail = count - (groups - 1) * every  # layers of the last group, which is not recomputed
    inputs = shared + (groups - 1) * row if grouped else shared + (count - tail) * row
    at_once = every if grouped else 1  # layers that are recomputed together
    recomputed = inputs + at_once * largest - row if groups > 1 else 0.0  # the first one's input is counted in `inputs`
    below = inputs + (tail - 1) * layer
    if groups == 1 and count > 1 and plain:
        below -= _unsaved_bytes(model, forest)
    images = forest.tokens / model.vision.image_tokens * adapted_image_bytes(model) if model.vision is not None else 0.0
    return SavedActivations(images + below + last + head, images + max(below, recomputed))


def adapted_image_bytes(model: ModelSizes) -> float:
    """Count the bytes that projector and tower save of an image with adapters, from the first adapted layer on.

    A position of width D saves the projector's input, that of its activation function and that of its second linear, and the
    embedding. Of a tower's layer of widths H and F a patch saves 8 H + 3 F: inputs and outputs of both norms, queries, keys,
    values and result; what CLIP's activation function saves, and what it returns. The first layer's input, which needs no
    gradient, is not saved.
    """
    vision, layers = model.vision, model.adapted_layers
    if vision is None or layers is None:
        return 0.0
    rank = 0 if model.lora is None else model.lora.r
    projector = vision.image_tokens * (vision.hidden + 3 * model.shapes.hidden + 2 * rank)
    tower = layers * (8 * vision.hidden + 3 * vision.intermediate + 6 * rank) - (vision.hidden if layers else 0)
    return float(model.dtype_bytes * (projector + vision.patches * tower))


def _unsaved_bytes(model: ModelSizes, forest: ForestSizes) -> float:
    """Count what the first layer does not save, since nothing below its first adapter needs a gradient."""
    shapes, lora, width = model.shapes, model.lora, model.dtype_bytes
    if lora is None or model.adapted_layers is not None or {"q_proj", "k_proj", "v_proj"} & set(lora.target_modules):
        return 0.0
    result = forest.tokens * shapes.query * width if "o_proj" in lora.target_modules else 0
    return _attention_bytes(model, forest.inner) - result + forest.tokens * (shapes.hidden * width + 4)


def layer_bytes(model: ModelSizes, tokens: float, reads: AttentionReads) -> float:
    """Count the bytes that one layer saves, for keys and values of `tokens` and the queries in `reads`."""
    shapes, width, rows = model.shapes, model.dtype_bytes, reads.queries
    subset = rows < tokens  # then the queries' input is another tensor than that of keys and values
    inputs = (tokens + rows + (rows if subset else 0)) * (shapes.hidden * width + 4)
    if shapes.qk_norm:
        inputs += rows * (shapes.query * width + 4 * shapes.heads) + tokens * (shapes.key * width + 4 * shapes.kv_heads)
    gated = 2 * rows * shapes.intermediate * width
    whole = 0.0
    if model.trained:  # linears that are trained save their inputs: the normalised ones and the gated product
        whole = width * (tokens * shapes.hidden + rows * (shapes.hidden + shapes.intermediate))
        whole += width * rows * (shapes.hidden if subset else 0)
        whole += width * rows * shapes.query if model.device_type == "cpu" else 0  # on a GPU attention saves its result
    return inputs + gated + whole + _attention_bytes(model, reads) + _adapter_bytes(model, tokens, rows)


def mixer_bytes(model: ModelSizes, tokens: float) -> float:
    """Count the bytes that a gated DeltaNet saves, with transformers' own implementation in PyTorch."""
    return MIXER_COPIES[model.dtype_bytes] * 4.0 * model.mixer_values * tokens


def _adapter_bytes(model: ModelSizes, tokens: float, rows: float) -> float:
    """Count the bytes that a layer saves because of its adapters."""
    shapes, lora, width = model.shapes, model.lora, model.dtype_bytes
    if lora is None:
        return 0.0
    total = 0.0 if width == 4 else lora.parameters / shapes.layers * width  # the casts
    sizes = {"o_proj": shapes.query, "down_proj": shapes.intermediate}
    together = TOGETHER if rows == tokens else (("q_proj",), ("k_proj", "v_proj"), *TOGETHER[1:])
    for names in together:
        count = tokens if "k_proj" in names else rows
        size = sizes.get(names[0], shapes.hidden)
        adapted = sum(name in lora.target_modules for name in names)
        total += count * adapted * lora.r * width  # low-rank activations
        # The linears' common input, which is otherwise recomputed; attention saves that of o_proj.
        if 0 < adapted < len(names) or (adapted and lora.dropout and "o_proj" not in names):
            total += count * size * width
    return total


def _attention_bytes(model: ModelSizes, reads: AttentionReads) -> float:
    shapes, lora, width, rows = model.shapes, model.lora, model.dtype_bytes, reads.queries
    if model.device_type == "cuda":
        return 2 * rows * shapes.query * width + 2 * reads.keys * shapes.key * width + 4 * rows * shapes.heads
    inputs = (rows * shapes.query + 2 * reads.keys * shapes.key) * max(width, 4)  # the CPU's attention is in fp32
    saves_result = lora is not None and "o_proj" in lora.target_modules
    return inputs + (rows * shapes.query * width if saves_result else 0)


def fullest_forest(sizes: Sequence[int], token_budget: int, max_trees: int) -> list[int]:
    """Choose the trees of the fullest forest within the budget, the largest first; return their indices into `sizes`."""
    chosen: list[int] = []
    left = token_budget
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if len(chosen) == max_trees:
            break
        if sizes[index] <= left:
            chosen.append(index)
            left -= sizes[index]
    return chosen
