"""The flat AdamW, clipping and the schedule."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from srcfast.errors import InputError
from srcfast.runtime.optimizer import AdamW, learning_rate_at


def small_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()


def test_updates_equal_those_of_torch_with_vectors_undecayed() -> None:
    ours, theirs = small_network(), small_network()
    optimizer = AdamW(ours.parameters(), weight_decay=0.3)
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    oracle = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}])
    for step in range(4):
        x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        oracle.zero_grad()
        ours(x).square().mean().backward()
        theirs(x).square().mean().backward()
        norm = float(optimizer.gradient_norm())
        expected_norm = float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.1))
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        optimizer.clip(norm, 0.1)
        for group in oracle.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.step(0.01 * (step + 1))
        oracle.step()
    for mine, true in zip(ours.parameters(), theirs.parameters(), strict=True):
        # clip_grad_norm_ divides by norm + 1e-6: clipped gradients differ by 1e-6 of theirs.
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-6)


def test_a_norm_below_the_limit_is_left_alone() -> None:
    network = small_network()
    optimizer = AdamW(network.parameters())
    network(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    before = optimizer.gradients.clone()
    norm = float(optimizer.gradient_norm())
    optimizer.clip(norm, norm * 1.01)
    assert torch.equal(before, optimizer.gradients) and norm > 0


def test_state_goes_through_safetensors_and_training_continues_the_same() -> None:
    def step(network: nn.Module, optimizer: AdamW) -> None:
        optimizer.zero_grad()
        network(torch.ones(2, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step(0.05)

    first = small_network()
    optimizer = AdamW(first.parameters(), weight_decay=0.1)
    step(first, optimizer)
    second = small_network(seed=9)
    second.load_state_dict(first.state_dict())
    resumed = AdamW(second.parameters(), weight_decay=0.1)
    resumed.load_state_dict(load(save(optimizer.state_dict())))
    step(first, optimizer)
    step(second, resumed)
    for mine, true in zip(second.parameters(), first.parameters(), strict=True):
        assert torch.equal(mine, true)


def test_nothing_to_train_or_mixed_dtypes_are_refused() -> None:
    with pytest.raises(InputError, match="found none"):
        AdamW([])
    with pytest.raises(InputError, match="float32.*float64"):
        AdamW([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))])


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    rates = [learning_rate_at(step, 11, 2.0, warmup_ratio=0.25, min_ratio=0.1) for step in range(11)]
    assert rates[:4] == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])
    assert rates[-1] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in zip(rates[3:], rates[4:], strict=False))
    assert learning_rate_at(0, 1, 3.0) == 3.0
