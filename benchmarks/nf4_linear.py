"""A linear over a frozen 4-bit weight, from the few rows of decoding to the many of packed training.

`whole weight` is an ordinary linear: what 4 bits cost in time.
"""

from __future__ import annotations

from torch import Tensor, nn

from srcfast_benchmarks.harness import Benchmark, Inputs, Run, Shape, main, normal
from srcfast_kernels import nf4_linear, nf4_quantize
from srcfast_kernels.nf4_linear import nf4_linear_reference

SHAPES: dict[str, list[Shape]] = {
    "cpu": [{"rows": rows, "in": 1024, "out": 2816, "dtype": "float32"} for rows in (1, 16, 512)],
    "cuda": [{"rows": rows, "in": 4096, "out": 11008, "dtype": "bfloat16"} for rows in (1, 16, 64, 512, 8192)],
}


def inputs(shape: Shape, device: str) -> Inputs:
    """Rows that want a gradient, and a quantised weight."""
    common = {"device": device, "dtype": shape["dtype"]}
    whole = normal(shape["out"], shape["in"], scale=shape["in"] ** -0.5, seed=1, **common)
    return {
        "x": normal(shape["rows"], shape["in"], **common).requires_grad_(),
        "weight": nf4_quantize(whole),
        "whole": whole,
    }


def torch_linear(inputs: Inputs) -> Run:
    """Dequantised, and autograd's linear, which saves the dequantised weight."""
    return lambda: nf4_linear_reference(inputs["x"], inputs["weight"])


def srcfast(inputs: Inputs) -> Run:
    """Nothing is saved between forward and backward."""
    return lambda: nf4_linear(inputs["x"], inputs["weight"])


def bitsandbytes(inputs: Inputs) -> Run:
    """Linear4bit."""
    import bitsandbytes as bnb

    whole: Tensor = inputs["whole"]
    layer = bnb.nn.Linear4bit(whole.shape[1], whole.shape[0], bias=False, compute_dtype=whole.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(whole.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4")
    layer = layer.to(whole.device)
    return lambda: layer(inputs["x"])


def whole_weight(inputs: Inputs) -> Run:
    """Not in 4 bits."""
    return lambda: nn.functional.linear(inputs["x"], inputs["whole"])


BENCHMARK = Benchmark(
    name="nf4_linear",
    shapes=SHAPES,
    inputs=inputs,
    implementations={
        "torch": torch_linear,
        "srcfast": srcfast,
        "bitsandbytes": bitsandbytes,
        "whole weight": whole_weight,
    },
    limits=("whole weight",),
)

if __name__ == "__main__":
    main(BENCHMARK)
