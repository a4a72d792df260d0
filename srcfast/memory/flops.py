"""Necessary floating-point operations of the stages, and a device's rate: together they give MFU and forecast time.

A count is what the mathematics needs (PaLM, Chowdhery et al., 2022, arXiv 2204.02311, appendix B), a multiplication and an
addition as two: nothing that is recomputed, no padding, no elementwise work. With N the decoder's frozen linear weights, A
the adapters', Q heads times head size, L layers, D hidden size, V vocabulary; n tokens, of which h are multiplied by the head;
and P the sum over all queries of the keys that each sees:

    forward     n (2 N + 2 A) + 4 Q L P + 2 D V h
    training    n (4 N + 6 A) + 12 Q L P + 4 D V h

A frozen weight costs its product and the gradient of its input; an adapter's also the gradient of itself. A query and key
cost a product of Q for the score and one for the value; backward has two for each. The input gradient of the first layer,
which nothing needs, is counted nonetheless: it is 1 / (2 L) of the linear part at most. So is all of the last layer, of which a
run computes queries and MLP only for the rows that its loss reads: at most 1 / L less.
"""

from __future__ import annotations

import re
import time
from functools import cache

import torch

from srcfast.data.forest import Forest
from srcfast.memory.model_sizes import Shapes
from srcfast_kernels.cpu_products import product

# Dense rates by the makers' data sheets, in 1e12 a second: half precision with fp32 sums, and fp32 without tensor cores.
# An entry applies where all of its words occur in the device's name; of several, the one with the most words.
RATES: dict[str, tuple[float, float]] = {
    "A10": (125.0, 31.2),
    "A10G": (70.0, 35.0),
    "A30": (165.0, 10.3),
    "A40": (149.7, 37.4),
    "A100": (312.0, 19.5),
    "RTX A6000": (154.8, 38.7),
    "H100": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H100 NVL": (835.0, 60.0),
    "H200": (989.4, 66.9),
    "H200 NVL": (835.0, 60.0),
    "GH200": (989.4, 66.9),
    "B200": (2250.0, 75.0),
    "L4": (121.0, 30.3),
    "L40": (181.0, 90.5),
    "L40S": (362.0, 91.6),
    "RTX 6000 Ada": (364.2, 91.1),
    "RTX 3090": (71.0, 35.6),
    "RTX 3090 Ti": (80.0, 40.0),
    "RTX 4090": (165.2, 82.6),
    "RTX 4090 D": (147.1, 73.5),
    "RTX 5090": (209.5, 104.8),
}
OTHER_CHIPS = {"laptop", "mobile", "mig", "max-q"}  # words in a name of a chip that is not the data sheet's


def training_flops(
    shapes: Shapes, tokens: float, attended: float, head_rows: float, adapter_parameters: float
) -> float:
    """Count the necessary FLOPs of one forward and backward pass of LoRA training, by the formula above.

    Args:
        shapes: the decoder's.
        tokens: number of tokens (n).
        attended: sum over all queries of the keys that each sees (P); `attended_of` counts it.
        head_rows: positions whose log-probabilities are computed (h).
        adapter_parameters: number of the adapter's parameters (A); 0 for a base without an adapter.
    """
    linear = tokens * (4.0 * shapes.linear_weights + 6.0 * adapter_parameters)
    return (
        linear
        + 12.0 * shapes.query * shapes.attention_layers * attended
        + 4.0 * shapes.hidden * shapes.vocabulary * head_rows
    )


def forward_flops(
    shapes: Shapes, tokens: float, attended: float, head_rows: float, adapter_parameters: float = 0
) -> float:
    """Count the necessary FLOPs of a forward pass (prefill, references, judging); arguments as in `training_flops`."""
    linear = tokens * 2.0 * (shapes.linear_weights + adapter_parameters)
    return (
        linear
        + 4.0 * shapes.query * shapes.attention_layers * attended
        + 2.0 * shapes.hidden * shapes.vocabulary * head_rows
    )


def decode_flops(shapes: Shapes, tokens: float, attended: float, adapter_parameters: float = 0) -> float:
    """Count the necessary FLOPs of decoding `tokens` tokens, each multiplied by the head; `attended` as above."""
    return forward_flops(shapes, tokens, attended, tokens, adapter_parameters)


def attended_of(parent_keys: int, tokens: int) -> int:
    """Sum the keys that the queries of a segment of `tokens` see, causally, behind `parent_keys` tokens of its ancestors."""
    return tokens * parent_keys + tokens * (tokens + 1) // 2


def attended_in(forest: Forest) -> int:
    """Sum the keys that all queries of a forest on the host see."""
    lengths, paths = forest.cu_seqlens_q.diff().tolist(), forest.cu_seqlens_k.diff().tolist()
    return sum(attended_of(path - length, length) for length, path in zip(lengths, paths, strict=True))


def tokens_below_roots(forest: Forest) -> int:
    """Return the number of tokens below the roots, each of which has a log-probability."""
    return forest.num_tokens - sum(tree.segments[0].tokens.size for tree in forest.trees)


def known_flops(name: str, dtype: torch.dtype) -> float | None:
    """Look up a GPU's FLOPs per second by its name (`NVIDIA H100 80GB HBM3`); None if the table lacks it."""
    words = set(re.findall(r"[a-z0-9]+(?:-q)?", name.lower()))
    if words & OTHER_CHIPS or dtype == torch.float64:
        return None
    fitting = [entry for entry in RATES if set(entry.lower().split()) <= words]
    if not fitting:
        return None
    half, single = RATES[max(fitting, key=lambda entry: len(entry.split()))]
    return 1e12 * (half if dtype in (torch.bfloat16, torch.float16) else single)


@cache
def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """Return the device's FLOPs per second in `dtype`: the data sheet's, else those of a product, measured once a process."""
    device = torch.device(device)
    if device.type == "cuda" and (known := known_flops(torch.cuda.get_device_name(device), dtype)) is not None:
        return known
    return _measured_flops(device, dtype)


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Time square products for about 50 ms, at least two, and return the best rate."""
    size = 4096 if device.type == "cuda" else 768
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    runs = 0
    while runs < 3 or time.perf_counter() - began < 0.05:
        start = time.perf_counter()
        product(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if runs:  # not the first one, which also loads the library
            best = min(best, time.perf_counter() - start)
        runs += 1
    return 2.0 * size**3 / best
