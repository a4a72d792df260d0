"""Windows, soft caps and two-way ranges give on every backend what each root-to-leaf path alone gives."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import simulated_cuda
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srcfast.attention.forest_attention import forest_attend, forest_attention
from srcfast.attention.options import AttentionOptions
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import ConfigError

CPU_BACKENDS = ("blocks", "varlen_reference", "reference")


def drawn_forest(rng: np.random.Generator, longest: int = 12) -> Forest:
    trees = []
    for _ in range(int(rng.integers(1, 4))):
        parents = [-1, *(int(rng.integers(0, i)) for i in range(1, int(rng.integers(1, 6))))]
        trees.append(Tree(tuple(Segment(np.zeros(rng.integers(1, longest)), parent) for parent in parents)))
    return Forest.of(trees)


def drawn_ranges(rng: np.random.Generator, forest: Forest) -> tuple[tuple[int, int], ...]:
    """Up to two ranges in each segment, whole segments among them."""
    ranges: list[tuple[int, int]] = []
    for tree, starts in zip(forest.trees, forest.segment_start, strict=True):
        for segment, start in zip(tree.segments, starts, strict=True):
            begin, size = 0, len(segment.tokens)
            while begin < size and rng.random() < 0.5:
                first = begin + int(rng.integers(0, size - begin))
                end = first + int(rng.integers(1, size - first + 1))
                ranges.append((start + first, start + end))
                begin = end + 1
    return tuple(sorted(ranges))


def drawn_options(rng: np.random.Generator, forest: Forest) -> AttentionOptions:
    return AttentionOptions(
        window=int(rng.integers(1, 14)) if rng.random() < 0.7 else None,
        softcap=float(rng.uniform(0.3, 3.0)) if rng.random() < 0.5 else None,
        two_way=drawn_ranges(rng, forest) if rng.random() < 0.6 else (),
        beyond_window=bool(rng.random() < 0.5),
    )


def drawn_qkv(rng: np.random.Generator, forest: Forest, heads: int, kv_heads: int, size: int = 5) -> list[Tensor]:
    shapes = [(forest.num_tokens, count, size) for count in (heads, kv_heads, kv_heads)]
    return [torch.from_numpy(rng.standard_normal(shape)).requires_grad_() for shape in shapes]


def path_by_path(q: Tensor, k: Tensor, v: Tensor, forest: Forest, options: AttentionOptions) -> Tensor:
    """The definition, query by query."""
    output = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for path in map(torch.Tensor.tolist, forest.paths()):
        for position, row in enumerate(path):
            seen = {
                other
                for distance, other in enumerate(reversed(path[: position + 1]))
                if options.window is None or distance < options.window
            }
            for start, end in options.two_way:
                if start <= row < end:
                    seen |= set(range(start if options.beyond_window else row, end))
            keys = torch.tensor(sorted(seen))
            heads = [x[keys].repeat_interleave(group, dim=1) for x in (k, v)]  # [n, H, d] each
            scores = torch.einsum("hd,nhd->hn", q[row], heads[0]) / q.shape[-1] ** 0.5
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            attended = torch.einsum("hn,nhd->hd", scores.softmax(-1), heads[1])
            output = output.index_copy(0, torch.tensor([row]), attended[None])
    return output


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), heads=st.sampled_from([(1, 1), (4, 2)]), selected=st.booleans())
def test_options_do_what_they_say(backend: str, seed: int, heads: tuple[int, int], selected: bool) -> None:
    rng = np.random.default_rng(seed)
    forest = drawn_forest(rng)
    options = drawn_options(rng, forest)
    if backend == "varlen_reference" and options.window and options.longest_range > options.window:
        options = replace(options, beyond_window=False)  # refused; see below
    qkv = drawn_qkv(rng, forest, *heads)
    rows = None
    if selected:
        rows = torch.from_numpy(np.flatnonzero(rng.random(forest.num_tokens) < 0.4))
        if backend == "varlen_reference":
            rows = rows[~torch.isin(rows, torch.from_numpy(options.two_way_rows))]
        rows = rows if len(rows) else None
        if rows is None and backend == "varlen_reference":
            options = replace(options, two_way=())
    expected = path_by_path(*qkv, forest, options)
    expected = expected if rows is None else expected[rows]
    q = qkv[0] if rows is None else qkv[0][rows]
    output = forest_attention(q, *qkv[1:], forest, backend, rows, options)
    weight = torch.from_numpy(rng.standard_normal(output.shape))
    # fp64 against fp64: 1e-10 is some thousand roundings of numbers of size one.
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for actual, true in zip(
        torch.autograd.grad((output * weight).sum(), qkv),
        torch.autograd.grad((expected * weight).sum(), qkv),
        strict=True,
    ):
        torch.testing.assert_close(actual, true, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # the CPU's way without gradients
        again = forest_attention(q, *qkv[1:], forest, backend, rows, options)
    torch.testing.assert_close(again, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_window_that_covers_all_paths_is_none(seed: int) -> None:
    rng = np.random.default_rng(seed)
    forest = drawn_forest(rng)
    q, k, v = drawn_qkv(rng, forest, 2, 1)
    attend = forest_attend(forest)
    whole = attend(0, q, k, v)
    assert torch.equal(attend(0, q, k, v, AttentionOptions(window=forest.max_seqlen_k)), whole)
    if forest.max_seqlen_k > 1:
        assert not torch.allclose(attend(0, q, k, v, AttentionOptions(window=forest.max_seqlen_k - 1)), whole)


def test_a_backend_refuses_options_that_it_does_not_compute() -> None:
    rng = np.random.default_rng(torch.seed() % 2**32)
    forest = Forest.of([Tree((Segment(np.zeros(9)), Segment(np.zeros(3), 0)))])
    q, k, v = drawn_qkv(rng, forest, 2, 1)
    options = AttentionOptions(window=4, two_way=((1, 7),), beyond_window=True)
    with pytest.raises(ConfigError, match="varlen_reference.*window of 4, 1 two-way ranges of up to 6.*Fix"):
        forest_attention(q, k, v, forest, "varlen_reference", None, options)
    rows, options = torch.tensor([2, 8]), AttentionOptions(two_way=((1, 7),))
    with pytest.raises(ConfigError, match="two-way"):
        forest_attention(q[rows], k, v, forest, "varlen_reference", rows, options)
    rows = torch.tensor([0, 7, 8, 11])  # none in a range
    actual = forest_attention(q[rows], k, v, forest, "varlen_reference", rows, options)
    expected = forest_attention(q, k, v, forest, "reference", None, options)[rows]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


STAND_INS = {"flash_attn": simulated_cuda.stand_in_flash_attn, "xformers": simulated_cuda.stand_in_xformers}
KINDS = {
    "window": AttentionOptions(window=7),
    "two-way": AttentionOptions(two_way=((0, 0),)),
    "window and two-way": AttentionOptions(window=9, two_way=((0, 0),)),
    "beyond a window": AttentionOptions(window=50, two_way=((0, 0),), beyond_window=True),
    "soft cap": AttentionOptions(softcap=2.0),
}
REFUSED = {
    ("torch_varlen", "soft cap"),
    ("xformers", "soft cap"),
    ("xformers", "window and two-way"),
    ("xformers", "beyond a window"),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "xformers", None])
def test_cuda_backends_agree_with_the_reference(backend: str | None, kind: str) -> None:
    rng = np.random.default_rng(torch.seed() % 2**32)
    forest = drawn_forest(rng, longest=40)
    options = KINDS[kind]
    if options.two_way:
        options = replace(options, two_way=drawn_ranges(rng, forest))
    forest, options = forest.to("cuda"), options.within(forest)
    qkv = [x.detach().to("cuda", torch.bfloat16) for x in drawn_qkv(rng, forest, 4, 2, 32)]

    def run(name: str | None, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        output = forest_attention(*leaves, forest, name, None, options)
        return [output, *torch.autograd.grad(output.float().square().sum(), leaves)]

    with STAND_INS.get(backend or "", nullcontext)() if simulated_cuda.is_active() else nullcontext():
        both = options.window is not None and bool(options.two_way)
        if (backend, kind) in REFUSED and (both or options.softcap is not None):
            with pytest.raises(ConfigError, match=backend):
                run(backend, torch.bfloat16)
            return
        actual = run(backend, torch.bfloat16)
    expected = run("reference", torch.float32)
    for one, other in zip(actual, expected, strict=True):
        # bf16 rounds each of a key's gradients, of at most five segments, to 0.4 %, and the weights as well.
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05 * float(other.detach().abs().max()))
