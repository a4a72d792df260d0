"""Attention for some rows alone, and without gradients, gives what each root-to-leaf path alone gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.random_forests import causal_attention, trees
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srcfast.attention.forest_attention import forest_attend, forest_attention
from srcfast.attention.shared_prefix import shared_attention
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.models.decoder import Decoder, DecoderConfig

CPU_BACKENDS = ("blocks", "varlen_reference", "reference")


def random_qkv(num_tokens: int, heads: tuple[int, int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_tokens, h, 8, generator=generator, dtype=torch.float64) for h in (*heads, heads[1])]


def path_by_path(q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> Tensor:
    output = torch.empty_like(q)
    for path in forest.paths():
        output = output.index_copy(0, path, causal_attention(q[path], k[path], v[path]))
    return output


def some_rows(num_tokens: int, share: float, seed: int) -> Tensor:
    """Ascending rows, at least one, with runs among them."""
    kept = np.random.default_rng(seed).random(num_tokens) < share
    kept[seed % num_tokens] = True
    return torch.from_numpy(np.flatnonzero(kept))


@settings(max_examples=40, deadline=None)
@given(
    drawn=st.lists(trees(), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    seed=st.integers(0, 99),
)
def test_attention_that_meets_shared_paths_once_equals_each_path_alone(
    drawn: list[Tree], heads: tuple[int, int], seed: int
) -> None:
    forest = Forest.of(drawn)
    q, k, v = random_qkv(forest.num_tokens, heads, seed)
    expected = path_by_path(q, k, v, forest)
    # fp64; PyTorch's kernel takes its exponentials to 1e-7 or so where it is compiled with the faster of them.
    torch.testing.assert_close(forest_attention(q, k, v, forest, "blocks"), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shared_attention(q, k, v, forest), expected, rtol=1e-6, atol=1e-6)  # from its plan


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    drawn=st.lists(trees(), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_attention_of_some_rows_is_theirs_among_all(
    backend: str, drawn: list[Tree], heads: tuple[int, int], share: float, seed: int
) -> None:
    forest = Forest.of(drawn)
    qkv = random_qkv(forest.num_tokens, heads, seed)
    rows = some_rows(forest.num_tokens, share, seed)
    expected = path_by_path(*qkv, forest)[rows]
    found = forest_attention(qkv[0][rows], *qkv[1:], forest, backend, rows)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    q, k, v = leaves = [x.requires_grad_() for x in qkv]
    found = forest_attention(q[rows], k, v, forest, backend, rows)
    expected = path_by_path(q, k, v, forest)[rows]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)  # fp64, some thousand roundings
    gradients = (torch.autograd.grad(x.square().sum(), leaves, materialize_grads=True) for x in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_long_and_unlike_segments_agree_in_fp32_and_in_half() -> None:
    rng = np.random.default_rng(1)

    def tree(*segments: tuple[int, int]) -> Tree:
        return Tree(tuple(Segment(rng.integers(0, 9, n), parent) for n, parent in segments))

    forest = Forest.of(
        [tree((1301, -1), (97, 0), (213, 0), (5, 1), (6, 1)), tree((7, -1), (1, 0)), tree((600, -1), *[(40, 0)] * 9)]
    )
    q, k, v = (x.float() for x in random_qkv(forest.num_tokens, (4, 2), 5))
    expected = forest_attention(q.double(), k.double(), v.double(), forest, "reference")
    found = shared_attention(q, k, v, forest)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)  # fp32 over up to 1,600 keys
    for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3)):  # rounded to the type at both ends
        half = [x.to(dtype) for x in (q, k, v)]
        expected = forest_attention(*(x.double() for x in half), forest, "reference")
        found = forest_attention(*half, forest, "blocks")
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_decoder_gives_the_rows_asked_for_as_among_all_and_the_same_gradients(num_layers: int, qk_norm: bool) -> None:
    config = DecoderConfig(61, 24, 40, num_layers, 4, 2, 6, 1e-6, 10000.0, qk_norm=qk_norm, qkv_bias=not qk_norm)
    torch.manual_seed(num_layers)
    decoder = Decoder(config).double()
    forest = Forest.of([Tree((Segment(np.arange(9)), Segment([3, 4], 0), Segment([3, 5, 1], 0), Segment([7], 2)))])
    rows = torch.tensor([8, 9, 13, 14])

    def run(of: Tensor | None) -> Tensor:
        return decoder(decoder.embed(forest.token_ids), forest.positions, forest_attend(forest, rows=of), of)

    whole, found = run(None)[rows], run(rows)
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)  # fp64
    weight = torch.randn(found.shape, dtype=torch.float64)
    parameters = [p for p in decoder.parameters() if p is not decoder.lm_head.weight]
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), parameters),
        torch.autograd.grad((whole * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        again = run(rows)
    torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-6)  # the CPU kernel's exponentials
