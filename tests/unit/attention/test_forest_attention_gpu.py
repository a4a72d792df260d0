"""The CUDA backends against the dense reference in fp32, forward and backward.

FlashAttention's rule: the greatest error is at most twice that of plain PyTorch in the same type, both taken against fp32. Plain
PyTorch here is the same call by its definition, over the same copies of keys and values: attention rounds each copy's gradient
to the type, and the copies' sum, which is taken in fp32, is rounded once more. The dense reference, which has no copies, bounds
the root mean square of the errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import simulated_cuda
import torch
from torch import Tensor

from srcfast.attention.forest_attention import available_backends, flash_takes, forest_attention
from srcfast.data.forest import Forest, Segment, Tree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FLOOR = 1e-5  # an error that is no error at all, where plain PyTorch happens to be exact
SIMULATED = simulated_cuda.is_active()
SHORTER = 5 if SIMULATED else 1  # a simulated device attends block by block
SEEDS = range(1 if SIMULATED else 3)


@pytest.fixture(autouse=True)
def _stand_ins() -> Iterator[None]:
    """A simulated device has stand-ins for the libraries."""
    with ExitStack() as stack:
        if SIMULATED:
            stack.enter_context(simulated_cuda.stand_in_flash_attn())
            stack.enter_context(simulated_cuda.stand_in_xformers())
        yield


def skip_unless_installed(backend: str) -> None:
    if not SIMULATED and backend not in available_backends():
        pytest.skip(f"{backend} is not installed; available: {', '.join(available_backends())}")


def random_tree(rng: np.random.Generator) -> Tree:
    """Up to eight segments of odd lengths below any parents; half of the trees are one chain."""
    count, chain = int(rng.integers(1, 9)), rng.random() < 0.5
    parents = [-1, *(i - 1 if chain else int(rng.integers(0, i)) for i in range(1, count))]
    return Tree(tuple(Segment(np.zeros(rng.integers(1, 200 // SHORTER)), parent) for parent in parents))


def forest_of(shape: str, seed: int) -> Forest:
    if shape == "random":
        rng = np.random.default_rng(seed)
        return Forest.of([random_tree(rng) for _ in range(4)])
    if shape == "chains":  # nothing to gather
        return Forest.of([Tree((Segment(np.zeros(n)), Segment(np.zeros(97 // SHORTER), 0))) for n in (1, 130, 257)])
    return Forest.of([Tree((Segment(np.zeros(641 // SHORTER)), *[Segment(np.zeros(191 // SHORTER), 0)] * 8))])


def output_and_gradients(backend: str, forest: Forest, qkv: list[Tensor], gradient: Tensor) -> list[Tensor]:
    leaves = [part.detach().requires_grad_() for part in qkv]
    output = forest_attention(*leaves, forest, backend)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", ["random", "chains", "eight children"])
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "xformers"])
def test_errors_are_at_most_twice_plain_pytorch_s(
    backend: str, dtype: torch.dtype, heads: tuple[int, int, int], shape: str, seed: int
) -> None:
    skip_unless_installed(backend)
    forest = forest_of(shape, seed).to("cuda")
    generator = torch.Generator("cuda").manual_seed(seed)
    num_heads, kv_heads, size = heads
    shapes = [(forest.num_tokens, count, size) for count in (num_heads, kv_heads, kv_heads, num_heads)]
    *qkv, gradient = (torch.randn(s, generator=generator, device="cuda").to(dtype) for s in shapes)
    precise = output_and_gradients("reference", forest, [part.float() for part in qkv], gradient.float())
    plain = output_and_gradients("varlen_reference", forest, qkv, gradient)
    dense = output_and_gradients("reference", forest, qkv, gradient)
    # The allocator hands out what was freed last: a value that isn't written shows.
    poison = [torch.full(s, float("nan"), dtype=dtype, device="cuda") for s in shapes for _ in range(2)]
    del poison
    ours = output_and_gradients(backend, forest, qkv, gradient)
    for name, found, usual, whole, true in zip("oqkv", ours, plain, dense, precise, strict=True):
        assert found.dtype == dtype
        error, allowed = ((x.float() - true).abs().max().item() for x in (found, usual))
        assert error <= 2 * allowed + FLOOR, (name, error, allowed)
        error, allowed = ((x.float() - true).square().mean().sqrt().item() for x in (found, whole))
        assert error <= 1.5 * allowed + FLOOR, (name, error, allowed)


@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "xformers"])
def test_keys_and_values_may_be_parts_of_a_wider_tensor(backend: str) -> None:
    skip_unless_installed(backend)
    for shape in ("random", "chains"):
        forest = forest_of(shape, 0).to("cuda")
        wide = torch.randn(forest.num_tokens, 12, 64, device="cuda", dtype=torch.bfloat16)
        parts = list(wide.split([8, 2, 2], dim=1))
        whole = forest_attention(*(part.contiguous() for part in parts), forest, backend)
        assert torch.equal(forest_attention(*parts, forest, backend), whole)


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 64), (torch.float64, 8), (torch.bfloat16, 12)], ids=str)
def test_what_the_kernels_do_not_take_goes_by_blocks(dtype: torch.dtype, size: int, with_rows: bool) -> None:
    forest = forest_of("random", 1).to("cuda")
    rows = torch.arange(1, forest.num_tokens, 3) if with_rows else None
    queries = forest.num_tokens if rows is None else len(rows)
    q, k, v = (
        torch.randn(n, heads, size, device="cuda", dtype=dtype, requires_grad=True)
        for n, heads in ((queries, 4), (forest.num_tokens, 2), (forest.num_tokens, 2))
    )
    found = forest_attention(q, k, v, forest, rows=rows)
    assert torch.equal(found, forest_attention(q, k, v, forest, "blocks", rows))
    expected = forest_attention(q, k, v, forest, "reference", rows)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}[
        dtype
    ]  # of sums of numbers of size one
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    mine, true = (torch.autograd.grad(output.float().square().sum(), (q, k, v)) for output in (found, expected))
    for ours, theirs in zip(mine, true, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_head_sizes_with_kernels_of_some_devices_alone_go_by_blocks_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {}
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        sizes = (64, 100, 192, 200, 224, 256, 264)
        taken[capability] = [n for n in sizes if flash_takes(torch.empty(1, n, device="cuda", dtype=torch.bfloat16))]
    assert taken[(8, 0)] == taken[(9, 0)] == [64, 192, 200, 224, 256]
    assert taken[(8, 9)] == taken[(12, 0)] == [64, 192, 256] and taken[(7, 5)] == []


@pytest.mark.simulated
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("flash_attn", torch.bfloat16),
        ("torch_varlen", torch.float16),
        ("blocks", torch.float32),
        ("blocks", torch.float64),
        ("blocks", torch.bfloat16),
    ],
    ids=str,
)
def test_a_forest_is_planned_once_and_without_a_wait(backend: str, dtype: torch.dtype, with_rows: bool) -> None:
    """xformers' mask is not among them: its stand-in has no tensors. The library itself sends page-locked lists."""
    forest = forest_of("eight children", 0)
    rows = torch.arange(1, forest.num_tokens, 3) if with_rows else None
    count = forest.num_tokens if rows is None else len(rows)
    q, k, v = (
        torch.randn(n, heads, 8, device="cuda", dtype=dtype, requires_grad=True)
        for n, heads in ((count, 4), (forest.num_tokens, 2), (forest.num_tokens, 2))
    )
    with simulated_cuda.recording() as record:
        forest = forest.to("cuda")
        outputs = [forest_attention(q, k, v, forest, backend, rows) for _ in range(2)]
        plans = {key: id(plan) for key, plan in forest.cache.items()}
        sum(outputs).sum().backward()
    assert not record.waits and not record.pageable_copies, record.text()
    assert len(plans) == (0 if with_rows else 1)
    assert plans == {key: id(plan) for key, plan in forest.cache.items()}
