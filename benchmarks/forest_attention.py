"""Attention over trees that share a prompt, against every root-to-leaf path on its own.

`paths` runs each path by itself, as usual trainers do; `dense mask` runs each tree under a mask, as attention with a custom mask
does; `equal work` is no forest, but plain sequences of as many multiplications: what the attention alone would take.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from srcfast.attention.forest_attention import forest_attention
from srcfast.data.forest import Forest, Segment, Tree
from srcfast_benchmarks.harness import Benchmark, Inputs, Run, Shape, main, normal

# trees of a prompt and children: pairs of preference tuning, and a sample's candidates.
SHAPES: dict[str, list[Shape]] = {
    "cpu": [
        {"trees": 4, "prompt": 160, "children": children, "response": 48, "heads": 8, "head_size": 64, "dtype": "float32"}
        for children in (2, 8)
    ],
    "cuda": [
        {"trees": trees, "prompt": 640, "children": children, "response": 192, "heads": 32, "head_size": 128, "dtype": "bfloat16"}
        for trees, children in ((8, 2), (4, 8))
    ],
}  # fmt: skip


def inputs(shape: Shape, device: str) -> Inputs:
    """Queries, keys and values [T, H, d] of the packed forest."""
    prompt, response = np.arange(shape["prompt"]), np.arange(shape["response"])
    segments = (Segment(prompt), *(Segment(response, 0) for _ in range(shape["children"])))
    forest = Forest.of([Tree(segments) for _ in range(shape["trees"])]).to(device)
    made: Inputs = {"forest": forest, "shape": shape}
    for seed, name in enumerate(("q", "k", "v")):
        size = (forest.num_tokens, shape["heads"], shape["head_size"])
        made[name] = normal(*size, device=device, dtype=shape["dtype"], seed=seed).requires_grad_()
    return made


def paths_alone(inputs: Inputs) -> Run:
    """Every path with its own copy of the prompt, packed."""
    forest: Forest = inputs["forest"]
    rows = torch.cat(forest.paths()).to(inputs["q"].device)
    lengths = [len(path) for path in forest.paths()]
    alone = plain_forest(lengths, str(inputs["q"].device))

    def run() -> Tensor:
        q, k, v = (inputs[name].index_select(0, rows) for name in ("q", "k", "v"))
        return forest_attention(q, k, v, alone)

    return run


def srcfast(inputs: Inputs) -> Run:
    """The forest."""
    return lambda: forest_attention(inputs["q"], inputs["k"], inputs["v"], inputs["forest"])


def dense_mask(inputs: Inputs) -> Run:
    """PyTorch's attention, a tree a row of the batch, under the ancestor mask."""
    forest: Forest = inputs["forest"]
    trees = len(forest.trees)
    length = forest.num_tokens // trees
    visible = torch.zeros(length, length, dtype=torch.bool, device=inputs["q"].device)
    for path in forest.paths():
        if int(path[-1]) < length:  # of the first tree; all are alike
            visible[path[:, None], path] |= torch.ones(
                len(path), len(path), dtype=torch.bool, device=path.device
            ).tril()

    def run() -> Tensor:
        q, k, v = (inputs[name].unflatten(0, (trees, length)).transpose(1, 2) for name in ("q", "k", "v"))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible)
        return attended.transpose(1, 2).flatten(0, 1)

    return run


def equal_work(inputs: Inputs) -> Run:
    """Plain causal sequences: as many tokens as the forest has, in lengths that give its number of query-key products."""
    forest, shape = inputs["forest"], inputs["shape"]
    prompt, response, children = shape["prompt"], shape["response"], shape["children"]
    products = prompt * prompt / 2 + children * (response * prompt + response * response / 2)
    tokens = forest.num_tokens // shape["trees"]
    length = min(tokens, math.ceil(2 * products / tokens))  # n sequences of L tokens: n L^2 / 2 products
    lengths = [length] * (tokens // length) + ([tokens % length] if tokens % length else [])
    alone = plain_forest(lengths * shape["trees"], str(inputs["q"].device))
    return lambda: forest_attention(inputs["q"], inputs["k"], inputs["v"], alone)


def plain_forest(lengths: list[int], device: str) -> Forest:
    """Sequences without children."""
    return Forest.of([Tree((Segment(np.arange(length)),)) for length in lengths]).to(device)


BENCHMARK = Benchmark(
    name="forest_attention",
    shapes=SHAPES,
    inputs=inputs,
    implementations={"paths": paths_alone, "srcfast": srcfast, "dense mask": dense_mask, "equal work": equal_work},
    limits=("equal work",),
)

if __name__ == "__main__":
    main(BENCHMARK)
