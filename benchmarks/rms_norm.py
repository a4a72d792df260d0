"""RMS normalisation with a frozen weight, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srcfast_benchmarks.harness import Benchmark, Inputs, Run, Shape, main, normal, on
from srcfast_kernels import rms_norm

EPS = 1e-6
SHAPES: dict[str, list[Shape]] = {
    "cpu": [{"tokens": 4096, "hidden_size": size, "dtype": "float32"} for size in (576, 2048)],
    "cuda": [
        {"tokens": tokens, "hidden_size": size, "dtype": "bfloat16"}
        for tokens in (2048, 16384)
        for size in (2048, 4096)
    ],
}


def inputs(shape: Shape, device: str) -> Inputs:
    """x, which wants a gradient, and a weight, which doesn't."""
    x = normal(shape["tokens"], shape["hidden_size"], device=device, dtype=shape["dtype"]).requires_grad_()
    return {"x": x, "weight": torch.ones_like(x[0], requires_grad=False)}


def transformers_norm(inputs: Inputs) -> Run:
    """As transformers writes it: in fp32, operation by operation."""
    x, weight = inputs.values()

    def run() -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)

    return run


def torch_rms_norm(inputs: Inputs) -> Run:
    """PyTorch's."""
    x, weight = inputs.values()
    return lambda: nn.functional.rms_norm(x, weight.shape, weight, EPS)


def srcfast(inputs: Inputs) -> Run:
    """One kernel in each direction."""
    return lambda: rms_norm(*inputs.values(), EPS)


def liger(inputs: Inputs) -> Run:
    """Liger's kernels; the weight's gradient is formed all the same."""
    on("cuda", inputs)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, weight = inputs.values()
    return lambda: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


BENCHMARK = Benchmark(
    name="rms_norm",
    shapes=SHAPES,
    inputs=inputs,
    implementations={"transformers": transformers_norm, "srcfast": srcfast, "torch": torch_rms_norm, "liger": liger},
)

if __name__ == "__main__":
    main(BENCHMARK)
