"""Rotary position embedding of queries, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from srcfast_benchmarks.harness import Benchmark, Inputs, Run, Shape, main, normal
from srcfast_kernels import rope

SHAPES: dict[str, list[Shape]] = {
    "cpu": [{"tokens": 4096, "heads": 9, "head_size": 64, "dtype": "float32"}],
    "cuda": [{"tokens": tokens, "heads": 32, "head_size": 128, "dtype": "bfloat16"} for tokens in (2048, 16384)],
}


def inputs(shape: Shape, device: str) -> Inputs:
    """Queries [T, H, d], which want a gradient, and angles [T, d]."""
    tokens, heads, size = shape["tokens"], shape["heads"], shape["head_size"]
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, device=device) / size)
    angles = (torch.arange(tokens, device=device)[:, None] * frequencies).repeat(1, 2)
    kind = getattr(torch, shape["dtype"])
    return {
        "x": normal(tokens, heads, size, device=device, dtype=shape["dtype"]).requires_grad_(),
        "cos": angles.cos().to(kind),
        "sin": angles.sin().to(kind),
    }


def transformers_rope(inputs: Inputs) -> Run:
    """As transformers writes it: halves swapped into a copy."""
    x, cos, sin = inputs.values()

    def run() -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    return run


def srcfast(inputs: Inputs) -> Run:
    """One pass in each direction; of x nothing is saved."""
    return lambda: rope(*inputs.values())


BENCHMARK = Benchmark(
    name="rope", shapes=SHAPES, inputs=inputs, implementations={"transformers": transformers_rope, "srcfast": srcfast}
)

if __name__ == "__main__":
    main(BENCHMARK)
