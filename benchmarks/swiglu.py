"""The gated activation, forward and backward."""

from __future__ import annotations

from torch import nn

from srcfast_benchmarks.harness import Benchmark, Inputs, Run, Shape, main, normal, on
from srcfast_kernels import swiglu

SHAPES: dict[str, list[Shape]] = {
    "cpu": [{"tokens": 4096, "intermediate_size": 1536, "dtype": "float32"}],
    "cuda": [{"tokens": tokens, "intermediate_size": 11008, "dtype": "bfloat16"} for tokens in (2048, 8192)],
}


def inputs(shape: Shape, device: str) -> Inputs:
    """Gate and up, both with gradients."""
    size = (shape["tokens"], shape["intermediate_size"])
    return {
        name: normal(*size, device=device, dtype=shape["dtype"], seed=seed).requires_grad_()
        for seed, name in enumerate(("gate", "up"))
    }


def torch_swiglu(inputs: Inputs) -> Run:
    """As transformers writes it."""
    gate, up = inputs.values()
    return lambda: nn.functional.silu(gate) * up


def srcfast(inputs: Inputs) -> Run:
    """silu is recomputed, not saved."""
    return lambda: swiglu(*inputs.values())


def liger(inputs: Inputs) -> Run:
    """Liger's kernels."""
    on("cuda", inputs)
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = inputs.values()
    return lambda: LigerSiLUMulFunction.apply(gate, up)


BENCHMARK = Benchmark(
    name="swiglu",
    shapes=SHAPES,
    inputs=inputs,
    implementations={"transformers": torch_swiglu, "srcfast": srcfast, "liger": liger},
)

if __name__ == "__main__":
    main(BENCHMARK)
