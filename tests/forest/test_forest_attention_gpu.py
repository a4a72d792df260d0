"""The CUDA backends against the dense reference in fp32, forward and backward.

FlashAttention's rule: our error is at most twice that of plain PyTorch in the same type, both taken against fp32.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.runtime.attention import available_backends, forest_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FLOOR = 1e-5  # an error that is no error at all, where plain PyTorch happens to be exact


def random_tree(rng: np.random.Generator) -> Tree:
    """Up to eight segments of odd lengths below any parents; half of the trees are one chain."""
    count, chain = int(rng.integers(1, 9)), rng.random() < 0.5
    parents = [-1, *(i - 1 if chain else int(rng.integers(0, i)) for i in range(1, count))]
    return Tree(tuple(Segment(np.zeros(rng.integers(1, 200)), parent) for parent in parents))


def forest_of(shape: str, seed: int) -> Forest:
    if shape == "random":
        rng = np.random.default_rng(seed)
        return Forest.of([random_tree(rng) for _ in range(4)])
    if shape == "chains":  # nothing to gather
        return Forest.of([Tree((Segment(np.zeros(n)), Segment(np.zeros(97), 0))) for n in (1, 130, 257)])
    return Forest.of([Tree((Segment(np.zeros(641)), *[Segment(np.zeros(191), 0)] * 8))])


def output_and_gradients(backend: str, forest: Forest, qkv: list[Tensor], gradient: Tensor) -> list[Tensor]:
    leaves = [part.detach().requires_grad_() for part in qkv]
    output = forest_attention(*leaves, forest, backend)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["random", "chains", "eight children"])
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "xformers"])
def test_errors_are_at_most_twice_plain_pytorch_s(
    backend: str, dtype: torch.dtype, heads: tuple[int, int, int], shape: str, seed: int
) -> None:
    if backend not in available_backends():
        pytest.skip(f"{backend} is not installed; available: {', '.join(available_backends())}")
    forest = forest_of(shape, seed).to("cuda")
    generator = torch.Generator("cuda").manual_seed(seed)
    num_heads, kv_heads, size = heads
    shapes = [(forest.num_tokens, count, size) for count in (num_heads, kv_heads, kv_heads, num_heads)]
    *qkv, gradient = (torch.randn(s, generator=generator, device="cuda").to(dtype) for s in shapes)
    precise = output_and_gradients("reference", forest, [part.float() for part in qkv], gradient.float())
    plain = output_and_gradients("reference", forest, qkv, gradient)
    # The allocator hands out what was freed last: a value that isn't written shows.
    poison = [torch.full(s, float("nan"), dtype=dtype, device="cuda") for s in shapes for _ in range(2)]
    del poison
    ours = output_and_gradients(backend, forest, qkv, gradient)
    for name, found, usual, true in zip("oqkv", ours, plain, precise, strict=True):
        assert found.dtype == dtype
        error, allowed = ((x.float() - true).abs().max().item() for x in (found, usual))
        assert error <= 2 * allowed + FLOOR, (name, error, allowed)


@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "xformers"])
def test_keys_and_values_may_be_parts_of_a_wider_tensor(backend: str) -> None:
    if backend not in available_backends():
        pytest.skip(f"{backend} is not installed; available: {', '.join(available_backends())}")
    for shape in ("random", "chains"):
        forest = forest_of(shape, 0).to("cuda")
        wide = torch.randn(forest.num_tokens, 12, 64, device="cuda", dtype=torch.bfloat16)
        parts = list(wide.split([8, 2, 2], dim=1))
        whole = forest_attention(*(part.contiguous() for part in parts), forest, backend)
        assert torch.equal(forest_attention(*parts, forest, backend), whole)


def test_the_automatic_choice_takes_what_the_kernels_do_not_by_blocks() -> None:
    forest = forest_of("random", 1).to("cuda")
    for dtype, size in ((torch.float32, 64), (torch.bfloat16, 12)):
        q, k, v = (torch.randn(forest.num_tokens, heads, size, device="cuda", dtype=dtype) for heads in (4, 2, 2))
        assert torch.equal(forest_attention(q, k, v, forest), forest_attention(q, k, v, forest, "blocks"))
