"""What a training pass keeps between forward and backward, in bytes: counted from shapes, as the autograd functions save it.

With b bytes an element, D hidden size, Q and K the widths of queries and keys, F the MLP's, r the rank, H heads, and T tokens
of which h meet the head, a layer whose linears are all adapted keeps

    b T (2 D + 2 F + 7 r) + 8 T              the inputs of its norms, gate and up, each adapter's low-rank activation;
                                             for each norm a number a token
    b (2 Q T + 2 K T') + 4 H T               attention on a GPU: queries, result, the T' >= T keys and values it reads

and the pass as a whole b (2 T D + h D): the final norm's input and output, and the head's unit gradients. No logits are kept,
nor what a layer can have again from the above (normalised inputs, the gated product). On a CPU attention keeps padded groups
of segments with their weights instead.

With checkpointing every n layers only the groups' inputs are kept, and one group's activations while it is run again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from srcfast.data.forest import Forest
from srcfast.runtime.attention import FUSED_ABOVE, plan_blocks
from srcfast.runtime.flops import attended_of
from srcfast.runtime.memory import LoRASizes, ModelSizes
from srcfast.runtime.varlen_plan import varlen_plan


@dataclass(frozen=True)
class ForestSizes:
    """What memory and time depend on in a forest.

    Attributes:
        tokens: that are run.
        keys: rows of keys and values that variable-length attention reads: `tokens`, or more where prefixes are copied.
        head_rows: positions whose log-probabilities are taken: all but the trees' roots.
        attended: sum over all queries of the keys that each sees.
        groups: of the CPU's padded attention: (segments, queries, keys) of each; empty for a GPU.
        trees: in the forest.
    """

    tokens: int
    keys: int
    head_rows: int
    attended: int
    groups: tuple[tuple[int, int, int], ...]
    trees: int

    @classmethod
    def of(cls, forest: Forest, device_type: str) -> ForestSizes:
        """Of a forest that is to be run on "cuda" or "cpu"."""
        host = forest.host or forest
        roots = sum(tree.segments[0].tokens.size for tree in host.trees)
        lengths, paths = host.cu_seqlens_q.diff().tolist(), host.cu_seqlens_k.diff().tolist()
        attended = sum(attended_of(path - length, length) for length, path in zip(lengths, paths, strict=True))
        groups: tuple[tuple[int, int, int], ...] = ()
        keys = host.num_tokens
        if device_type == "cpu":
            planned = plan_blocks(host, torch.float32, torch.device("cpu"))[-1]
            groups = tuple((rows, long, wide) for rows, long, wide, _ in planned)
        elif (copies := varlen_plan(host).copies) is not None:
            keys = len(copies.index)
        return cls(host.num_tokens, keys, host.num_tokens - roots, attended, groups, len(host.trees))

    def times(self, count: float) -> ForestSizes:
        """Of `count` times as many trees of the same kind."""
        return ForestSizes(
            tokens=round(self.tokens * count),
            keys=round(self.keys * count),
            head_rows=round(self.head_rows * count),
            attended=round(self.attended * count),
            groups=tuple((round(rows * count), long, span) for rows, long, span in self.groups),
            trees=round(self.trees * count),
        )


def saved_bytes(model: ModelSizes, forest: ForestSizes, checkpoint_every: int = 0) -> float:
    """Bytes that one forward pass of LoRA training keeps for its backward, at the moment when they are most.

    Args:
        model: with an adapter.
        forest: what is run.
        checkpoint_every: layers a group whose activations are recomputed; 0 keeps all.
    """
    shapes, tokens, width = model.shapes, forest.tokens, model.dtype_bytes
    row = tokens * shapes.hidden * width
    layer = layer_bytes(model, forest)
    layers = shapes.layers * layer
    if checkpoint_every:
        group = min(checkpoint_every, shapes.layers)
        # The first layer's input is the group's.
        layers = math.ceil(shapes.layers / group) * row + group * layer - row
    shared = 2 * tokens * shapes.head_dim * width  # cosines and sines
    shared += sum(4 * rows * long * span for rows, long, span in forest.groups if span > FUSED_ABOVE)  # masks
    head = row + 4 * tokens + forest.head_rows * (shapes.hidden * width + 2 * 8)  # rows and slots are int64
    # In 16 bits the adapters are cast, and the casts are kept.
    casts = 0 if width == 4 or model.lora is None else model.lora.parameters * width
    return layers + shared + head + casts


def layer_bytes(model: ModelSizes, forest: ForestSizes) -> float:
    """Bytes that one layer keeps."""
    shapes, lora, tokens, width = model.shapes, model.lora, forest.tokens, model.dtype_bytes
    inputs = 2 * tokens * (shapes.hidden * width + 4)
    if shapes.qk_norm:
        inputs += tokens * ((shapes.query + shapes.key) * width + 4 * (shapes.heads + shapes.kv_heads))
    gated = 2 * tokens * shapes.intermediate * width
    return inputs + gated + _attention_bytes(model, forest) + tokens * _adapter_bytes(model, lora)


def _adapter_bytes(model: ModelSizes, lora: LoRASizes | None) -> float:
    """Of a token, beside what the layer keeps anyway."""
    if lora is None:
        return 0.0
    shapes, width = model.shapes, model.dtype_bytes
    total = 0.0
    # A token's low-rank activations are kept; and where not all linears of one input are adapted, that input, too.
    for names, size in (
        (("q_proj", "k_proj", "v_proj"), shapes.hidden),
        (("gate_proj", "up_proj"), shapes.hidden),
        (("o_proj",), shapes.query),
        (("down_proj",), shapes.intermediate),
    ):
        adapted = sum(name in lora.target_modules for name in names)
        total += adapted * lora.r * width
        if lora.dropout:  # each its own input, and which of it was dropped
            total += adapted * size * (width + (1 if model.device_type == "cuda" else width))
        elif 0 < adapted < len(names):
            total += size * width
    return total


def _attention_bytes(model: ModelSizes, forest: ForestSizes) -> float:
    shapes, tokens, width = model.shapes, forest.tokens, model.dtype_bytes
    if model.device_type == "cuda":
        read = 2 * forest.keys * shapes.key * width
        return 2 * tokens * shapes.query * width + read + 4 * tokens * shapes.heads
    wide = max(width, 4)  # the CPU's attention is in fp32
    queries = sum(rows * long for rows, long, _ in forest.groups)
    keys = sum(rows * span for rows, _, span in forest.groups)
    fused = [(rows, long, span) for rows, long, span in forest.groups if span > FUSED_ABOVE]
    padded = [(rows, long, span) for rows, long, span in forest.groups if span <= FUSED_ABOVE]
    kept = sum(rows * long * (shapes.query + shapes.heads * span) for rows, long, span in padded)
    # Products copy keys and values head by head, but for a group of one row, which keeps the gathered ones as they are.
    kept += sum(2 * rows * span * shapes.key for rows, _, span in padded if rows > 1)
    if fused or any(rows == 1 for rows, _, _ in padded):
        kept += 2 * keys * shapes.key
    if fused:
        kept += queries * shapes.query + sum(rows * long * (shapes.query + shapes.heads) for rows, long, _ in fused)
    output = tokens * shapes.query * width if model.lora is not None and "o_proj" in model.lora.target_modules else 0
    return kept * wide + (0 if model.lora is not None and model.lora.dropout else output)


def fullest_forest(sizes: Sequence[int], token_budget: int, most_trees: int) -> list[int]:
    """Which trees make the fullest forest that the budget allows: the largest first, as many as fit. Indices into `sizes`."""
    chosen: list[int] = []
    room = token_budget
    for index in _descending(sizes):
        if len(chosen) == most_trees:
            break
        if sizes[index] <= room:
            chosen.append(index)
            room -= sizes[index]
    return chosen


def _descending(sizes: Sequence[int]) -> Iterable[int]:
    return sorted(range(len(sizes)), key=lambda index: -sizes[index])
