"""How fast is a 4-bit weight made whole again, against bitsandbytes and against the bandwidth of memory?

`copy` is not the operation: it moves as many bytes as dequantisation reads and writes.
"""

from __future__ import annotations

from torch import Tensor

from srcfast_benchmarks.harness import Benchmark, Inputs, Run, Shape, main, normal
from srcfast_kernels import nf4_dequantize, nf4_quantize
from srcfast_kernels.backends import use_backend

SHAPES: dict[str, list[Shape]] = {
    "cpu": [{"out": 4096, "in": 4096, "dtype": dtype} for dtype in ("float32", "bfloat16")],
    "cuda": [
        {"out": out, "in": into, "dtype": "bfloat16"} for out, into in ((4096, 4096), (4096, 11008), (11008, 4096))
    ],
}


def inputs(shape: Shape, device: str) -> Inputs:
    """A quantised weight."""
    whole = normal(shape["out"], shape["in"], device=device, dtype=shape["dtype"])
    return {"weight": nf4_quantize(whole), "whole": whole}


def torch_table(inputs: Inputs) -> Run:
    """PyTorch's operations."""
    weight = inputs["weight"]

    def run() -> Tensor:
        with use_backend("reference"):
            return nf4_dequantize(weight)

    return run


def srcfast(inputs: Inputs) -> Run:
    """Scales and values in one pass."""
    weight = inputs["weight"]
    return lambda: nf4_dequantize(weight)


def bitsandbytes(inputs: Inputs) -> Run:
    """Its layout, quantised by itself: two passes with double quantisation."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(inputs["whole"], compress_statistics=True, quant_type="nf4")
    return lambda: functional.dequantize_4bit(packed, state)


def copy(inputs: Inputs) -> Run:
    """Half of the bytes read, half written."""
    weight, whole = inputs["weight"], inputs["whole"]
    moved = weight.num_bytes + whole.numel() * whole.element_size()
    source = whole.view(-1)[: moved // 2 // whole.element_size()]
    target = source.clone()
    return lambda: target.copy_(source)


BENCHMARK = Benchmark(
    name="nf4",
    shapes=SHAPES,
    inputs=inputs,
    implementations={"torch": torch_table, "srcfast": srcfast, "bitsandbytes": bitsandbytes, "copy": copy},
    limits=("copy",),
)

if __name__ == "__main__":
    main(BENCHMARK)
