"""A gated layer with adapters, its norm included: what does it cost to compute again what is not saved?

`torch` saves the normalised input and the gated activation as well. The memory shown is the peak of one layer's pass, most of it
buffers of backward; what is saved, and so adds up over layers, is counted in tests/unit/models/test_kept_for_backward.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from srcfast_benchmarks.harness import Benchmark, Inputs, Run, Shape, main, normal
from srcfast_kernels.lora_linear import Adapted, Norm, lora_linears, swiglu_lora_linear

SCALING, EPS = 2.0, 1e-6
NAMES = ("gate", "up", "down")
SHAPES: dict[str, list[Shape]] = {
    "cpu": [{"tokens": 2048, "hidden_size": 576, "intermediate_size": 1536, "rank": 16, "dtype": "float32"}],
    "cuda": [
        {"tokens": tokens, "hidden_size": 4096, "intermediate_size": 11008, "rank": 16, "dtype": "bfloat16"}
        for tokens in (2048, 8192)
    ],
}


def inputs(shape: Shape, device: str) -> Inputs:
    """One input, a frozen norm, three frozen weights, three adapters."""
    size, inner, rank = shape["hidden_size"], shape["intermediate_size"], shape["rank"]
    common = {"device": device, "dtype": shape["dtype"]}
    made: Inputs = {"x": normal(shape["tokens"], size, **common).requires_grad_()}
    made["norm"] = normal(size, seed=1, **common)
    for seed, name in enumerate(NAMES, start=2):
        out, into = (size, inner) if name == "down" else (inner, size)
        made[name] = normal(out, into, scale=into**-0.5, seed=seed, **common)
        made[f"{name} A"] = nn.Parameter(normal(rank, into, scale=into**-0.5, seed=10 + seed, **common))
        made[f"{name} B"] = nn.Parameter(normal(out, rank, scale=0.01, seed=20 + seed, **common))
    return made


def torch_layer(inputs: Inputs) -> Run:
    """Operation by operation, under autograd."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, inputs[name]) + SCALING * ((x @ inputs[f"{name} A"].T) @ inputs[f"{name} B"].T)

    def run() -> Tensor:
        x = F.rms_norm(inputs["x"], inputs["norm"].shape, inputs["norm"], EPS)
        return linear(F.silu(linear(x, "gate")) * linear(x, "up"), "down")

    return run


def srcfast(inputs: Inputs) -> Run:
    """x, gate and up are saved, and each adapter's low-rank activation."""
    gate, up, down = (Adapted(inputs[name], None, inputs[f"{name} A"], inputs[f"{name} B"], SCALING) for name in NAMES)

    def run() -> Tensor:
        gated = lora_linears(inputs["x"], [gate, up], Norm(inputs["norm"], EPS))
        return swiglu_lora_linear(gated[0], gated[1], down)

    return run


def frozen(inputs: Inputs) -> Run:
    """Not the operation: the same layer without adapters."""

    def run() -> Tensor:
        x = F.rms_norm(inputs["x"], inputs["norm"].shape, inputs["norm"], EPS)
        return F.linear(F.silu(F.linear(x, inputs["gate"])) * F.linear(x, inputs["up"]), inputs["down"])

    return run


BENCHMARK = Benchmark(
    name="lora_mlp",
    shapes=SHAPES,
    inputs=inputs,
    implementations={"torch": torch_layer, "srcfast": srcfast, "frozen": frozen},
    limits=("frozen",),
)

if __name__ == "__main__":
    main(BENCHMARK)
