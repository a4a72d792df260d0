"""Dropout by a hash: the same bits in every backend, the right share, and no trace of one mask in another."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from helpers.seeds import fresh_rng
from torch import Tensor

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.models.dropout_keys import dropout_keys
from srcfast_kernels import dropout
from srcfast_kernels.backends import Backend, use_backend
from srcfast_kernels.dropout import dropout_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of up to 130,000 correlations of independent masks one lies so far out in less than one run of a million.
FARTHEST = 7.5


def fresh() -> np.random.Generator:
    return fresh_rng()


def random_keys(count: int) -> Tensor:
    return torch.from_numpy(fresh().integers(-(2**63), 2**63 - 1, count)).to(DEVICE)


def mask(keys: Tensor, columns: int, layer: int = 0, share: float = 0.5) -> Tensor:
    """[T, C] whether each value is kept."""
    return dropout(torch.ones(len(keys), columns, device=keys.device), keys, layer, share) != 0


@pytest.mark.parametrize("layer", [0, 1, 16, 223, 2**31 - 1])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.75])
def test_every_backend_gives_the_same_bits(layer: int, share: float) -> None:
    keys = torch.cat([random_keys(9), torch.tensor([0, -1, 2**63 - 1, -(2**63), 2**31, 2**32 - 1], device=DEVICE)])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.from_numpy(fresh().normal(size=(len(keys), 1500))).to(DEVICE, dtype)
        found = []
        for backend in get_args(Backend):
            with use_backend(backend):
                found.append(dropout(x, keys, layer, share))
        if dtype == torch.bfloat16:  # Triton's interpreter cuts where the others round: which are dropped is the same
            found = [one != 0 for one in found]
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])


@pytest.mark.parametrize("rows", [0, 1, 33, 200])
def test_the_cpu_s_chunks_leave_no_trace(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = random_keys(rows)
    whole = mask(keys, 40)
    monkeypatch.setattr(sys.modules["srcfast_kernels.dropout"], "CHUNK_ELEMENTS", 40 * 32)
    with use_backend("torch"):
        assert torch.equal(mask(keys, 40), whole)
    assert not mask(keys, 0).numel()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_share_is_dropped_and_the_rest_scaled(share: float) -> None:
    keys = random_keys(1000)
    x = torch.from_numpy(fresh().normal(size=(1000, 1000))).to(DEVICE).requires_grad_()
    out = dropout(x, keys, 3, share)
    kept = out != 0
    spread = (share * (1 - share) / kept.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - share)) < 6 * spread
    torch.testing.assert_close(out[kept], x[kept] / (1 - share), rtol=1e-15, atol=0)
    gradient = torch.from_numpy(fresh().normal(size=(1000, 1000))).to(DEVICE)
    out.backward(gradient)
    torch.testing.assert_close(x.grad, torch.where(kept, gradient / (1 - share), 0.0), rtol=1e-15, atol=0)
    # No row and no column has more of it than chance gives.
    for side in (0, 1):
        means = kept.double().mean(side)
        assert float((means - (1 - share)).abs().max()) < FARTHEST * (share * (1 - share) / 1000) ** 0.5


def between_columns(share: float) -> Tensor:
    return mask(random_keys(8192), 256, share=share).T


def between_rows(share: float) -> Tensor:
    return mask(random_keys(256), 8192, share=share)


def between_neighbours(share: float) -> Tensor:
    """Rows of one tree, of trees in neighbouring places, and of steps in turn, with the keys that training makes."""
    seed = int(random_keys(1)) & 0xFFFFFFFF
    forest = Forest.of([Tree((Segment(np.zeros(32, dtype=np.int64)),)) for _ in range(3)])
    keys = [dropout_keys(forest, seed, step, [place, place + 1, place + 2]) for step in (0, 1) for place in (0, 3)]
    return mask(torch.cat(keys).to(DEVICE), 8192, share=share)


def between_layers(share: float) -> Tensor:
    keys = random_keys(64)
    return torch.stack([mask(keys, 128, layer, share).flatten() for layer in range(224)])


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("masks", [between_columns, between_rows, between_neighbours, between_layers])
def test_no_mask_tells_anything_of_another(masks: Callable[[float], Tensor], share: float) -> None:
    found = masks(share).double()  # [masks, values]
    standard = (found - (1 - share)) / (share * (1 - share)) ** 0.5
    scores = (
        standard @ standard.T / found.shape[1] ** 0.5
    )  # [masks, masks] normal, with a spread of 1, where independent
    pairs = scores[tuple(torch.triu_indices(len(found), len(found), 1))]
    assert float(pairs.abs().max()) < FARTHEST
    assert abs(float(pairs.square().mean()) - 1.0) < 6 * (2.0 / len(pairs)) ** 0.5


@pytest.mark.parametrize("backend", get_args(Backend))
def test_a_product_with_what_is_left_keeps_its_input_alone(backend: Backend) -> None:
    rng, keys = fresh(), random_keys(7)
    x, weight, gradient = (torch.from_numpy(rng.normal(size=shape)).to(DEVICE) for shape in ((7, 30), (3, 30), (7, 3)))
    results, kept = [], set[int]()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    for fused in (True, False):
        own = [part.clone().requires_grad_() for part in (x, weight)]
        with use_backend(backend):
            if fused:
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    low = dropout_product(own[0], keys, 5, 0.3, own[1])
                assert kept == {own[0].data_ptr(), own[1].data_ptr(), keys.data_ptr()}
            else:
                low = dropout(own[0], keys, 5, 0.3) @ own[1].T
            low.backward(gradient)
        results.append([low, own[0].grad, own[1].grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)  # fp64 sums of 30 in another order


def test_autograd_s_gradient_is_that_of_finite_differences() -> None:
    keys = random_keys(4)
    x, weight = (
        torch.randn(*shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for shape in ((4, 9), (2, 9))
    )
    assert torch.autograd.gradcheck(lambda *parts: dropout_product(parts[0], keys, 1, 0.4, parts[1]), (x, weight))
