"""Every backend gives what each root-to-leaf path alone gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.random_forests import causal_attention, trees
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srcfast.attention import padded
from srcfast.attention.forest_attention import (
    available_backends,
    forest_attend,
    forest_attention,
    set_backend,
)
from srcfast.attention.padded_plan import plan_blocks
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import ConfigError

CPU_BACKENDS = ("blocks", "varlen_reference", "reference")


def random_qkv(num_tokens: int, heads: int, kv_heads: int, dim: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_tokens, heads, dim), (num_tokens, kv_heads, dim), (num_tokens, kv_heads, dim))
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def path_by_path(q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> Tensor:
    """The definition: each path as a sequence of its own; a shared row's output is any path's that has it."""
    output = torch.empty_like(q)
    for path in forest.paths():
        output = output.index_copy(0, path, causal_attention(q[path], k[path], v[path]))
    return output


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    drawn=st.lists(trees(), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    seed=st.integers(0, 99),
)
def test_attention_and_its_gradients_equal_those_of_each_path_alone(
    backend: str, drawn: list[Tree], heads: tuple[int, int], seed: int
) -> None:
    forest = Forest.of(drawn)
    qkv = random_qkv(forest.num_tokens, *heads, 5, seed)
    expected = path_by_path(*qkv, forest)
    output = forest_attention(*qkv, forest, backend)
    weight = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    # fp64 against fp64: 1e-10 is some thousand roundings of numbers of size one.
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for found, true in zip(
        torch.autograd.grad((output * weight).sum(), qkv),
        torch.autograd.grad((expected * weight).sum(), qkv),
        strict=True,
    ):
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(drawn=st.lists(trees(), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_long_paths_whose_scores_are_not_kept_agree_too(drawn: list[Tree], seed: int) -> None:
    forest = Forest.of(drawn)
    qkv = random_qkv(forest.num_tokens, 4, 2, 5, seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(padded, "CHUNK_BYTES", 1)  # a segment and a head at a time
        output = forest_attention(*qkv, forest, "blocks")
        found = torch.autograd.grad(output.square().sum(), qkv)
    expected = path_by_path(*qkv, forest)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    true = torch.autograd.grad(expected.square().sum(), qkv)
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_output_has_the_queries_type(dtype: torch.dtype) -> None:
    forest = Forest.of([Tree((Segment(np.arange(5)), Segment(np.arange(3), 0)))])
    q, k, v = (x.detach().to(dtype) for x in random_qkv(8, 2, 2, 4, 0))
    output = forest_attention(q, k, v, forest, "blocks")
    assert output.dtype == dtype
    expected = path_by_path(q.double(), k.double(), v.double(), forest)
    # Rounded once to the type at the end: half a unit in the last place of numbers about 1.
    tolerance = {torch.bfloat16: 8e-3, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def test_autocast_on_a_cpu_does_not_round_the_products_of_small_segments() -> None:
    forest = Forest.of(
        [Tree((Segment(np.arange(9)), Segment(np.arange(5), parent=0), Segment(np.arange(7), parent=0)))]
    )
    qkv = [x.detach().float().requires_grad_() for x in random_qkv(forest.num_tokens, 4, 2, 8, 0)]
    plain = forest_attention(*qkv, forest, "blocks")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = forest_attention(*qkv, forest, "blocks")
    assert cast.dtype == plain.dtype and torch.equal(cast, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_of_a_prompt_are_summed_over_its_responses_in_fp32(dtype: torch.dtype) -> None:
    """A prompt of 4 tokens and 600 responses of one: each adds about 1/5 to a value's gradient of about 120."""
    forest = Forest.of([Tree((Segment(np.arange(4)), *(Segment(np.arange(1), 0) for _ in range(600))))])
    qkv = [x.detach().to(dtype).requires_grad_() for x in random_qkv(forest.num_tokens, 2, 1, 8, 5)]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    weight = 0.5 + torch.rand(forest.num_tokens, 2, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    # As on a GPU without FlashAttention; a response at a time, as one call of PyTorch's sums in fp32 on a CPU.
    plan = plan_blocks(forest, dtype, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(padded, "CHUNK_BYTES", 1)
        found = torch.autograd.grad(padded.padded_attention(*qkv, plan), qkv, weight.to(dtype))
    true = torch.autograd.grad(forest_attention(*exact, forest, "reference"), exact, weight.to(dtype).double())
    for gradient, expected in zip(found[1:], true[1:], strict=True):
        # Each response's share is rounded to 0.4 % at most, and the sum once more; in 16 bits 120 + 1/5 would be 120.
        largest = float(expected.abs().max())
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=0.008 * largest)


@settings(max_examples=25, deadline=None)
@given(drawn=st.lists(trees(), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_the_order_of_trees_changes_nothing(drawn: list[Tree], seed: int) -> None:
    forest, turned = Forest.of(drawn), Forest.of(drawn[::-1])
    q, k, v = random_qkv(forest.num_tokens, 2, 2, 4, seed)
    ends = [start[0] for start in forest.segment_start[1:]] + [forest.num_tokens]
    rows = torch.cat([torch.arange(forest.segment_start[i][0], ends[i]) for i in reversed(range(len(drawn)))])
    there = forest_attention(q[rows], k[rows], v[rows], turned)
    torch.testing.assert_close(there, forest_attention(q, k, v, forest)[rows], rtol=1e-12, atol=1e-12)


def test_long_trees_of_unlike_lengths_agree_in_fp32() -> None:
    generator = torch.Generator().manual_seed(3)

    def tree(prompt: int, *children: int) -> Tree:
        parts = [
            Segment(torch.randint(0, 9, (n,), generator=generator).numpy(), p) for n, p in _sizes(prompt, children)
        ]
        return Tree(tuple(parts))

    forest = Forest.of([tree(301, 97, 213), tree(7, 1), tree(290, 120, 190), tree(1), tree(64, 33, 33, 33)])
    qkv = [x.detach().float().requires_grad_() for x in random_qkv(forest.num_tokens, 4, 2, 32, 5)]
    grads = {}
    for backend in CPU_BACKENDS:
        output = forest_attention(*qkv, forest, backend)
        grads[backend] = (output, *torch.autograd.grad(output.square().sum(), qkv))
    for backend in ("blocks", "varlen_reference"):
        for found, true in zip(grads[backend], grads["reference"], strict=True):
            # fp32 over some 600 keys of size one: 1e-4 of the largest entry.
            torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4 * float(true.detach().abs().max()))


def _sizes(prompt: int, children: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(prompt, -1), *((n, 0) for n in children)]


def test_a_backend_can_be_forced_and_unknown_ones_are_named() -> None:
    forest = Forest.of([Tree((Segment([1, 2]), Segment([3], 0)))])
    q, k, v = random_qkv(3, 2, 2, 4, 0)
    assert set(CPU_BACKENDS) <= set(available_backends())
    try:
        set_backend("reference")
        forced = forest_attend(forest)(0, q, k, v)
    finally:
        set_backend(None)
    torch.testing.assert_close(forced, forest_attention(q, k, v, forest), rtol=1e-12, atol=1e-12)
    with pytest.raises(ConfigError, match="'flsh'.*known: flash_attn"):
        set_backend("flsh")
    with pytest.raises(ConfigError, match="'flsh'"):
        forest_attention(q, k, v, forest, "flsh")
