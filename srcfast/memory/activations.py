"""What a training pass keeps between forward and backward, in bytes: counted from shapes, as the autograd functions save it.

With b bytes an element, D hidden size, Q and K the widths of queries and keys, F the MLP's, r the rank, H heads, and T tokens,
a layer whose linears are all adapted keeps

    b T (2 D + 2 F + 7 r) + 8 T              the inputs of its norms, gate and up, each adapter's low-rank activation;
                                             for each norm a number a token
    b (2 Q T + 2 K T') + 4 H T               attention on a GPU: queries, result, the T' >= T keys and values it reads

and in 16 bits its adapters as they are cast. The last layer has queries, and all that follows from them, for the M rows alone
that the loss reads. The pass as a whole keeps b (2 M D + h D): the final norm's input and output, and the unit gradients of
the h rows that meet the head. No logits are kept, nor what a layer can have again from the above (normalised inputs, the
gated product). On a CPU attention keeps queries, keys and values as they came.

With checkpointing every n layers only the groups' inputs are kept; then the last group's activations, or one group's while it
is run again, whichever is more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srcfast.attention.forest_attention import plan_blocks
from srcfast.attention.varlen_plan import varlen_plan
from srcfast.data.forest import Forest
from srcfast.data.logit_rows import response_logit_rows
from srcfast.memory.flops import attended_of
from srcfast.memory.model_sizes import ModelSizes

# Linears of one input, those of the attention first. The last layer's queries have an input of their own.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class AttentionReads:
    """What attention reads in a layer.

    Attributes:
        queries: its rows.
        keys: rows of keys and values that variable-length attention reads: all tokens, or more where prefixes are copied.
        groups: of the CPU's padded attention: (blocks, queries, keys) of each; empty for a GPU.
    """

    queries: float
    keys: float
    groups: tuple[tuple[float, int, int], ...]

    @classmethod
    def of(cls, forest: Forest, device_type: str, rows: Tensor | None = None) -> AttentionReads:
        """Of all tokens of a forest on the host, or of the queries of some rows."""
        queries = forest.num_tokens if rows is None else len(rows)
        if device_type == "cpu":
            planned = plan_blocks(forest, torch.float32, torch.device("cpu"), rows)[-1]
            return cls(queries, forest.num_tokens, tuple((blocks, long, wide) for blocks, long, wide, _ in planned))
        copies = varlen_plan(forest, rows).copies
        return cls(queries, forest.num_tokens if copies is None else len(copies.index), ())

    @property
    def plan_bytes(self) -> float:
        """Of the CPU's masks and index maps."""
        return sum(blocks * (4 * long * wide + 8 * (long + wide)) for blocks, long, wide in self.groups)

    def times(self, count: float) -> AttentionReads:
        groups = tuple((blocks * count, long, wide) for blocks, long, wide in self.groups)
        return AttentionReads(self.queries * count, self.keys * count, groups)


@dataclass(frozen=True)
class ForestSizes:
    """What memory and time depend on in a forest.

    Attributes:
        tokens: that are run.
        head_rows: positions whose log-probabilities are taken: all but the trees' roots.
        attended: sum over all queries of the keys that each sees.
        every: what attention reads in all layers but the last.
        last: what it reads there.
    """

    tokens: float
    head_rows: float
    attended: float
    every: AttentionReads
    last: AttentionReads

    @classmethod
    def of(cls, forest: Forest, device_type: str) -> ForestSizes:
        """Of a forest that is to be run on "cuda" or "cpu"."""
        host = forest.host or forest
        roots = sum(tree.segments[0].tokens.size for tree in host.trees)
        lengths, paths = host.cu_seqlens_q.diff().tolist(), host.cu_seqlens_k.diff().tolist()
        attended = sum(attended_of(path - length, length) for length, path in zip(lengths, paths, strict=True))
        every = AttentionReads.of(host, device_type)
        rows = response_logit_rows(host)
        last = AttentionReads.of(host, device_type, rows) if len(rows) else every
        return cls(host.num_tokens, host.num_tokens - roots, attended, every, last)

    def times(self, count: float) -> ForestSizes:
        """Of `count` times as many trees of the same kind; parts of one count, too."""
        return ForestSizes(
            self.tokens * count,
            self.head_rows * count,
            self.attended * count,
            self.every.times(count),
            self.last.times(count),
        )


@dataclass(frozen=True)
class SavedActivations:
    """Bytes kept for backward: when the loss is there, and when backward reaches what lies below the last layer."""

    at_the_head: float
    below: float

    @property
    def most(self) -> float:
        return max(self.at_the_head, self.below)


def activation_bytes(model: ModelSizes, forest: ForestSizes, checkpoint_every: int = 0) -> SavedActivations:
    """What one forward pass of LoRA training keeps for its backward.

    Args:
        model: with an adapter.
        forest: what is run; the model computes its last layer for the rows alone that the loss reads.
        checkpoint_every: layers a group whose activations are recomputed; 0 keeps all.
    """
    shapes, width, count = model.shapes, model.dtype_bytes, model.shapes.layers
    row = forest.tokens * shapes.hidden * width
    layer, last = (layer_bytes(model, forest.tokens, reads) for reads in (forest.every, forest.last))
    shared = 2 * forest.tokens * shapes.head_dim * width  # cosines and sines
    rows = forest.last.queries
    head = 2 * rows * shapes.hidden * width + 4 * rows
    head += forest.head_rows * (shapes.hidden * width + 2 * 8)  # rows and slots are int64
    every = checkpoint_every or count
    groups = math.ceil(count / every)
    tail = count - (groups - 1) * every  # layers of the last group, which is not run again
    inputs = shared + (groups - 1) * row
    again = inputs + every * layer - row if groups > 1 else 0.0  # the first layer's input is the group's
    below = inputs + (tail - 1) * layer
    if groups == 1 and count > 1:
        below -= _unsaved_bytes(model, forest)
    return SavedActivations(below + last + head, max(below, again))


def _unsaved_bytes(model: ModelSizes, forest: ForestSizes) -> float:
    """What the first layer does not keep, since below its first adapter nothing has a gradient."""
    shapes, lora, width = model.shapes, model.lora, model.dtype_bytes
    if lora is None or {"q_proj", "k_proj", "v_proj"} & set(lora.target_modules):
        return 0.0
    result = forest.tokens * shapes.query * width if "o_proj" in lora.target_modules else 0
    return _attention_bytes(model, forest.every) - result + forest.tokens * (shapes.hidden * width + 4)


def layer_bytes(model: ModelSizes, tokens: float, reads: AttentionReads) -> float:
    """Bytes that one layer keeps: of `tokens` keys and values, and of the queries that it reads."""
    shapes, width, rows = model.shapes, model.dtype_bytes, reads.queries
    alone = rows < tokens  # then the rows' input is another tensor than that of keys and values
    inputs = (tokens + rows + (rows if alone else 0)) * (shapes.hidden * width + 4)
    if shapes.qk_norm:
        inputs += rows * (shapes.query * width + 4 * shapes.heads) + tokens * (shapes.key * width + 4 * shapes.kv_heads)
    gated = 2 * rows * shapes.intermediate * width
    whole = 0.0
    if model.trained:  # linears that are trained keep their inputs: the normalised ones and the gated product
        whole = width * (tokens * shapes.hidden + rows * (shapes.hidden + shapes.intermediate))
        whole += width * rows * (shapes.hidden if alone else 0)
        whole += width * rows * shapes.query if model.device_type == "cpu" else 0  # on a GPU attention keeps its result
    return inputs + gated + whole + _attention_bytes(model, reads) + _adapter_bytes(model, tokens, rows)


def _adapter_bytes(model: ModelSizes, tokens: float, rows: float) -> float:
    """Beside what the layer keeps anyway."""
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
        # The common input, which else is made again; that of o_proj is what attention keeps.
        if 0 < adapted < len(names) or (adapted and lora.dropout and "o_proj" not in names):
            total += count * size * width
    return total


def _attention_bytes(model: ModelSizes, reads: AttentionReads) -> float:
    shapes, lora, width, rows = model.shapes, model.lora, model.dtype_bytes, reads.queries
    if model.device_type == "cuda":
        return 2 * rows * shapes.query * width + 2 * reads.keys * shapes.key * width + 4 * rows * shapes.heads
    kept = (rows * shapes.query + 2 * reads.keys * shapes.key) * max(width, 4)  # the CPU's attention is in fp32
    keeps_result = lora is not None and "o_proj" in lora.target_modules
    return kept + (rows * shapes.query * width if keeps_result else 0)


def fullest_forest(sizes: Sequence[int], token_budget: int, max_trees: int) -> list[int]:
    """Which trees make the fullest forest that the budget allows: the largest first, as many as fit. Indices into `sizes`."""
    chosen: list[int] = []
    room = token_budget
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if len(chosen) == max_trees:
            break
        if sizes[index] <= room:
            chosen.append(index)
            room -= sizes[index]
    return chosen
