"""How fast is the loss head, and how much memory does it take, against all logits at once and against its peers?

Log-probabilities of targets under a frozen head, and the gradient of the hidden states. `two products` is not the operation
but its two matrix products alone, over all rows at once: what it must cost at least.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config

from srcfast_benchmarks.harness import Benchmark, Inputs, Run, Shape, generator, main, normal, on
from srcfast_kernels import linear_logprob

CUDA_ROWS, VOCABULARIES = (2048, 8192), (32_064, 151_936)
SHAPES: dict[str, list[Shape]] = {
    "cpu": [
        {"rows": 2048, "hidden_size": 1024, "vocabulary": vocabulary, "dtype": dtype}
        for vocabulary, dtype in ((32_064, "float32"), (151_936, "float32"), (32_064, "bfloat16"))
    ],
    "cuda": [
        {"rows": rows, "hidden_size": 4096, "vocabulary": vocabulary, "dtype": "bfloat16"}
        for vocabulary in VOCABULARIES
        for rows in CUDA_ROWS
    ],
}


def inputs(shape: Shape, device: str) -> Inputs:
    """Hidden states that want a gradient, a frozen head, targets."""
    rows, hidden_size, vocabulary = shape["rows"], shape["hidden_size"], shape["vocabulary"]
    common: dict[str, Any] = {"device": device, "dtype": shape["dtype"]}
    return {
        "hidden": normal(rows, hidden_size, **common).requires_grad_(),
        "weight": normal(vocabulary, hidden_size, scale=hidden_size**-0.5, seed=1, **common),
        "targets": torch.randint(vocabulary, (rows,), generator=generator(device), device=device),
    }


def full_logits(inputs: Inputs) -> Run:
    """PyTorch as it is usually written: all logits, in fp32 from there on."""
    hidden, weight, targets = inputs.values()
    return lambda: (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def srcfast(inputs: Inputs) -> Run:
    """Unit gradients formed chunk by chunk in the forward pass; backward scales rows."""
    return lambda: linear_logprob(**inputs)


def srcfast_tiled(inputs: Inputs) -> Run:
    """No logits in device memory at all, recomputed tile by tile in backward."""
    on("cuda", inputs)
    return lambda: linear_logprob(**inputs, method="tiled")


def torch_linear_cross_entropy(inputs: Inputs) -> Run:
    """PyTorch's, from 2.15."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("this torch has no linear_cross_entropy")
    return lambda: -F.linear_cross_entropy(*inputs.values(), reduction="none")


def trl_chunked(inputs: Inputs) -> Run:
    """TRL's: tiles over the vocabulary, recomputed in backward."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    hidden, weight, targets = inputs.values()
    return lambda: ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )[0]


def liger(inputs: Inputs) -> Run:
    """Liger's fused linear cross-entropy; sums, since it gives a gradient a token only on request."""
    on("cuda", inputs)
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    hidden, weight, targets = inputs.values()
    apply = LigerFusedLinearCrossEntropyFunction.apply
    return lambda: -apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")[0]


def cut_cross_entropy(inputs: Inputs) -> Run:
    """Apple's: tiles on a GPU, torch.compile over all logits on a CPU."""
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight, targets = inputs.values()
    impl = "cce" if hidden.is_cuda else "torch_compile"
    functorch_config.donated_buffer = False  # its backward is timed over a graph that is retained
    return lambda: -linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)


def two_products(inputs: Inputs) -> Run:
    """h W^T, and as much again back."""
    hidden, weight, _ = inputs.values()
    return lambda: _TwoProducts.apply(hidden, weight)


class _TwoProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        ctx.save_for_backward(logits, weight)
        return logits[:, 0].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, weight = ctx.saved_tensors
        return logits @ weight, None


BENCHMARK = Benchmark(
    name="linear_logprob",
    shapes=SHAPES,
    inputs=inputs,
    implementations={
        "torch": full_logits,
        "srcfast": srcfast,
        "srcfast tiled": srcfast_tiled,
        "torch linear_cross_entropy": torch_linear_cross_entropy,
        "trl": trl_chunked,
        "liger": liger,
        "cut_cross_entropy": cut_cross_entropy,
        "two products": two_products,
    },
    limits=("two products",),
)

if __name__ == "__main__":
    main(BENCHMARK)
