"""From a judge's hidden states to scores and confidences of whole batches of samples: how fast?

`torch` reads the verdict tokens' logits and aggregates sample by sample, `torch batched` all samples at once, `full head`
multiplies by the whole vocabulary first, as judges behind a chat interface do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srcfast_benchmarks.harness import Benchmark, Inputs, Run, Shape, main, normal, on
from srcfast_kernels import pairwise_verdict
from srcfast_kernels.backends import use_backend

VOCABULARY = 151_936
SHAPES: dict[str, list[Shape]] = {
    device: [
        {"samples": samples, "candidates": candidates, "hidden_size": 1536, "dtype": dtype}
        for samples, candidates in ((16, 4), (64, 8))
    ]
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16"))
}


def inputs(shape: Shape, device: str) -> Inputs:
    """All ordered pairs of every sample, shuffled."""
    samples, candidates, size = shape["samples"], shape["candidates"], shape["hidden_size"]
    pairs = torch.tensor(
        [(s, i, j) for s in range(samples) for i in range(candidates) for j in range(candidates) if i != j]
    )
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))].to(device)
    common: dict[str, Any] = {"device": device, "dtype": shape["dtype"]}
    return {
        "hidden": normal(len(pairs), size, **common),
        "head": normal(VOCABULARY, size, scale=size**-0.5, seed=1, **common),
        "sample_ids": pairs[:, 0].contiguous(),
        "first": pairs[:, 1].contiguous(),
        "second": pairs[:, 2].contiguous(),
        "values": torch.tensor([1.0, 0.5, 0.0], device=device),
        "counts": torch.full((samples,), candidates, device=device),
    }


def srcfast(inputs: Inputs) -> Run:
    """Three rows of the head, all samples at once."""
    hidden, head, sample_ids, first, second, values, counts = inputs.values()
    rows, largest = head[:3].contiguous(), int(counts[0])
    options: dict[str, Any] = {"verdict_values": values, "sample_ids": sample_ids, "num_samples": len(counts)}
    return lambda: pairwise_verdict(hidden, rows, first, second, largest, **options).scores


def torch_batched(inputs: Inputs) -> Run:
    """The same in PyTorch's operations; on a CPU what srcfast runs."""
    on("cuda", inputs)
    run = srcfast(inputs)

    def by_torch() -> Tensor:
        with use_backend("torch"):
            return run()

    return by_torch


def torch_by_sample(inputs: Inputs) -> Run:
    """A loop over samples."""
    return _by_sample(inputs, full_head=False)


def full_head(inputs: Inputs) -> Run:
    """A loop over samples, behind logits of the whole vocabulary."""
    return _by_sample(inputs, full_head=True)


def _by_sample(inputs: Inputs, full_head: bool) -> Run:
    hidden, head, sample_ids, first, second, values, counts = inputs.values()
    rows, largest = head[:3], int(counts[0])

    def run() -> Tensor:
        logits = (hidden @ (head if full_head else rows).T)[:, :3].float()
        wins = logits.softmax(-1) @ values
        scores = []
        for sample in range(len(counts)):
            of_sample = sample_ids == sample
            p = wins.new_full((largest, largest), 0.5)
            p[first[of_sample], second[of_sample]] = wins[of_sample]
            q = 0.5 * (p + 1.0 - p.T)
            u = (2.0 * q - 1.0).abs() * (1.0 - (p + p.T - 1.0).abs())
            scores.append((u * q).sum(-1) / u.sum(-1))
        return torch.stack(scores)

    return run


BENCHMARK = Benchmark(
    name="pairwise_verdict",
    shapes=SHAPES,
    inputs=inputs,
    implementations={
        "torch": torch_by_sample,
        "srcfast": srcfast,
        "torch batched": torch_batched,
        "full head": full_head,
    },
)

if __name__ == "__main__":
    main(BENCHMARK)
