"""The q, k and v projections with their adapters: how much do adapters add to the frozen products, and against PEFT?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srcfast_benchmarks.harness import Benchmark, Inputs, Run, Shape, main, normal
from srcfast_kernels.lora_linear import Adapted, lora_linears

SCALING, PROJECTIONS = 2.0, 3
SHAPES: dict[str, list[Shape]] = {
    "cpu": [{"tokens": 2048, "hidden_size": 1024, "rank": rank, "dtype": "float32"} for rank in (8, 64)],
    "cuda": [
        {"tokens": tokens, "hidden_size": 4096, "rank": rank, "dtype": "bfloat16"}
        for tokens in (2048, 8192)
        for rank in (16, 64)
    ],
}


def inputs(shape: Shape, device: str) -> Inputs:
    """One input, three frozen weights, three adapters."""
    size, rank = shape["hidden_size"], shape["rank"]
    common = {"device": device, "dtype": shape["dtype"]}
    made: Inputs = {"x": normal(shape["tokens"], size, **common).requires_grad_()}
    for number in range(PROJECTIONS):
        made[f"weight{number}"] = normal(size, size, scale=size**-0.5, seed=1 + number, **common)
        made[f"a{number}"] = nn.Parameter(normal(rank, size, scale=size**-0.5, seed=11 + number, **common))
        made[f"b{number}"] = nn.Parameter(normal(size, rank, scale=0.01, seed=21 + number, **common))
    return made


def torch_linears(inputs: Inputs) -> Run:
    """Each by its definition, under autograd."""
    x = inputs["x"]

    def run() -> Tensor:
        outputs = [
            nn.functional.linear(x, weight) + SCALING * ((x @ a.T) @ b.T) for weight, a, b in _projections(inputs)
        ]
        return torch.stack(outputs)

    return run


def srcfast(inputs: Inputs) -> Run:
    """All three at once."""
    linears = [Adapted(weight, None, a, b, SCALING) for weight, a, b in _projections(inputs)]
    return lambda: torch.stack(lora_linears(inputs["x"], linears))


def peft(inputs: Inputs) -> Run:
    """PEFT's layers, one after the other."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    layers = []
    for weight, a, b in _projections(inputs):
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        base.weight = nn.Parameter(weight, requires_grad=False)
        settings = LoraConfig(r=len(a), lora_alpha=int(SCALING * len(a)))
        layer = Linear(base, "default", settings, r=len(a), lora_alpha=int(SCALING * len(a)))
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
        layers.append(layer)
    return lambda: torch.stack([layer(inputs["x"]) for layer in layers])


def frozen(inputs: Inputs) -> Run:
    """Not the operation: the frozen products alone."""
    return lambda: torch.stack([nn.functional.linear(inputs["x"], weight) for weight, _, _ in _projections(inputs)])


def _projections(inputs: Inputs) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(inputs[f"weight{n}"], inputs[f"a{n}"], inputs[f"b{n}"]) for n in range(PROJECTIONS)]


BENCHMARK = Benchmark(
    name="lora_linear",
    shapes=SHAPES,
    inputs=inputs,
    implementations={"torch": torch_linears, "srcfast": srcfast, "peft": peft, "frozen": frozen},
    limits=("frozen",),
)

if __name__ == "__main__":
    main(BENCHMARK)
