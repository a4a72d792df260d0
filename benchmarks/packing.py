"""Packing of sequences to a token budget: forests against TRL's packing of a data set, both best-fit decreasing.

From tokenised sequences to packed rows of token ids with the bounds that attention needs. TRL packs sequences only, so the
trees here have one segment; `pairs as trees` packs as many responses below prompts that they share.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from srcfast.data.forest import Forest, Segment, Tree
from srcfast_benchmarks.harness import Benchmark, Inputs, Run, Shape, main

BUDGET = 8192
SHAPES: list[Shape] = [{"sequences": 2000, "tokens": "200 to 900"}, {"sequences": 20_000, "tokens": "200 to 900"}]


def inputs(shape: Shape, device: str) -> Inputs:
    rng = np.random.default_rng(0)
    shortest, longest = (int(part) for part in str(shape["tokens"]).split(" to "))
    lengths = rng.integers(shortest, longest + 1, shape["sequences"])
    return {"sequences": [rng.integers(0, 32_000, length) for length in lengths]}


def trl(inputs: Inputs) -> Run:
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_dict({"input_ids": inputs["sequences"]})

    def run() -> Tensor:
        # A new fingerprint each time: nothing is taken from a cache on disk.
        packed = pack_dataset(
            dataset.select(range(len(dataset))), BUDGET, "bfd", map_kwargs={"load_from_cache_file": False}
        )
        return torch.tensor(sum(map(sum, packed["seq_lengths"])))

    return run


def srcfast(inputs: Inputs) -> Run:
    trees = [Tree((Segment(tokens),)) for tokens in inputs["sequences"]]

    def run() -> Tensor:
        return torch.tensor(sum(forest.num_tokens for forest in Forest.pack(trees, BUDGET)))

    return run


def pairs_as_trees(inputs: Inputs) -> Run:
    sequences = inputs["sequences"]
    trees = [
        Tree((Segment(one[: len(one) // 2]), Segment(one[len(one) // 2 :], 0), Segment(other[len(other) // 2 :], 0)))
        for one, other in zip(sequences[::2], sequences[1::2], strict=True)
    ]

    def run() -> Tensor:
        return torch.tensor(sum(forest.num_tokens for forest in Forest.pack(trees, BUDGET)))

    return run


BENCHMARK = Benchmark(
    name="packing",
    shapes={"cpu": SHAPES, "cuda": SHAPES},
    inputs=inputs,
    implementations={"trl": trl, "srcfast": srcfast, "srcfast pairs as trees": pairs_as_trees},
    limits=("srcfast pairs as trees",),
)

if __name__ == "__main__":
    main(BENCHMARK)
