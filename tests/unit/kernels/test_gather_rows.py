"""Gathered rows against plain indexing; the sum of the copies' gradients is the same every time, and in fp32.

In fp64 both sides round to 1e-16 and sum a few terms: 1e-12. In fp32: 1e-5. Triton's kernels are interpreted where no GPU is.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srcfast_kernels.backends import Backend, use_backend
from srcfast_kernels.gather_rows import RowCopies, gather_rows, gather_rows_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}
BACKENDS: tuple[Backend, ...] = ("triton", "torch")
INDICES = {
    "identity": [0, 1, 2, 3, 4, 5, 6],
    "prefix shared by three": [0, 1, 2, 3, 0, 1, 4, 5, 0, 1, 6],
    "any order, rows 0 and 5 never": [6, 2, 2, 4, 1, 2, 3, 6],
    "one row nine times": [3] * 9,  # more copies than a program reads at once
    "nothing": [],
}


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def copies_of(index: list[int], rows: int = 7) -> RowCopies:
    return RowCopies.of(torch.tensor(index, dtype=torch.int64, device=DEVICE), rows)


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())
def test_each_row_s_copies_are_listed_in_order(index: list[int]) -> None:
    copies = copies_of(index)
    assert [part.dtype for part in (copies.index, copies.starts, copies.places)] == [torch.int32] * 3
    starts, places = copies.starts.tolist(), copies.places.tolist()
    for row in range(7):
        assert places[starts[row] : starts[row + 1]] == [k for k, source in enumerate(index) if source == row]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())
@pytest.mark.parametrize("inner", [(1, 1), (2, 3), (3, 700)], ids=str)  # the last takes several blocks of columns
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32"])
def test_values_and_gradients_are_those_of_indexing(
    backend: Backend, index: list[int], inner: tuple[int, int], dtype: torch.dtype
) -> None:
    copies = copies_of(index)
    parts = [random(7, *inner, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2)]
    weights = [random(len(index), *inner, dtype=dtype, seed=seed) for seed in (3, 4)]
    with use_backend(backend):
        gathered = gather_rows(parts[0], parts[1], copies)
    expected = [gather_rows_reference(part, copies.index) for part in parts]
    for ours, theirs, part, weight in zip(gathered, expected, parts, weights, strict=True):
        assert torch.equal(ours, theirs)
        (mine,) = torch.autograd.grad((ours * weight).sum(), part, retain_graph=True)
        (true,) = torch.autograd.grad((theirs * weight).sum(), part)
        torch.testing.assert_close(mine, true, rtol=0, atol=DTYPES[dtype])
        unseen = [row for row in range(7) if row not in index]
        assert not mine[unseen].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(backend: Backend) -> None:
    copies = copies_of([0, 1, 0, 2], 4)
    parts = [random(4, 1, 2, dtype=torch.float64, seed=seed).requires_grad_() for seed in (1, 2)]
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda keys, values: gather_rows(keys, values, copies), parts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_and_values_may_be_parts_of_a_wider_tensor(backend: Backend) -> None:
    """As after one product for queries, keys and values; so may the gradients."""
    copies = copies_of(INDICES["prefix shared by three"])
    wide = random(7, 10, 6, dtype=torch.float64, seed=1).requires_grad_()
    weight = random(11, 8, 6, dtype=torch.float64, seed=2)
    with use_backend(backend):
        gathered = gather_rows(wide[:, 4:7], wide[:, 7:], copies)
    (mine,) = torch.autograd.grad(gathered, wide, [weight[:, 1:4], weight[:, 4:7]])
    expected = gather_rows_reference(wide[:, 4:], copies.index)
    (true,) = torch.autograd.grad(expected, wide, weight[:, 1:7])
    assert torch.equal(torch.cat(gathered, dim=1), expected)
    torch.testing.assert_close(mine, true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_gradients_are_summed_in_fp32_and_rounded_once(backend: Backend) -> None:
    """256 + 1 is 256 in bf16: summed there, the 64 ones would be lost."""
    copies = copies_of([0] * 65, 1)
    x = torch.zeros(1, 1, 8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    gradient = torch.ones(65, 1, 8, dtype=torch.bfloat16, device=DEVICE)
    gradient[0] = 256
    with use_backend(backend):
        keys, values = gather_rows(x, x, copies)
    (mine,) = torch.autograd.grad([keys, values], x, [gradient, torch.zeros_like(gradient)])
    assert mine.dtype == torch.bfloat16 and bool((mine == 320).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_s_order_is_fixed(backend: Backend) -> None:
    copies = copies_of([number % 3 for number in range(500)], 3)
    x = random(3, 1, 33, dtype=torch.float32, seed=1).requires_grad_()
    weights = [random(500, 1, 33, dtype=torch.float32, seed=seed) for seed in (2, 3)]
    grads = []
    for _ in range(3):
        with use_backend(backend):
            grads += torch.autograd.grad(gather_rows(x, x, copies), x, weights)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
