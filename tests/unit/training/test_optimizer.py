"""The flat AdamW, clipping and the schedule."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from srcfast.errors import ConfigError, InputError
from srcfast.training.optimizer import AdamW, learning_rate_at


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


def test_what_is_not_finite_changes_neither_weights_nor_moments() -> None:
    network, untouched = small_network(), small_network()
    optimizers = [AdamW(one.parameters(), weight_decay=0.1) for one in (network, untouched)]
    for step in range(3):
        for one, optimizer in zip((network, untouched), optimizers, strict=True):
            if one is untouched and step == 1:
                continue
            optimizer.zero_grad()
            one(torch.ones(2, 5, dtype=torch.float64)).square().sum().backward()
            optimizer.gradients[7] = torch.nan if step == 1 else optimizer.gradients[7]
            norm = optimizer.gradient_norm()
            optimizer.clip(norm, 0.5)
            optimizer.step(0.05, torch.isfinite(norm))
    assert torch.equal(optimizers[0].weights, optimizers[1].weights) and optimizers[0].weights.isfinite().all()
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # the count of steps among them


def test_a_norm_on_the_device_clips_as_a_number_does() -> None:
    for limit in (0.01, 1e6):
        optimizers = [AdamW(small_network().parameters()) for _ in range(2)]
        for optimizer in optimizers:
            optimizer.gradients.copy_(torch.linspace(-1, 2, len(optimizer.gradients), dtype=torch.float64))
        norm = optimizers[0].gradient_norm()
        optimizers[0].clip(norm, limit)
        optimizers[1].clip(float(norm), limit)
        torch.testing.assert_close(optimizers[0].gradients, optimizers[1].gradients, rtol=1e-12, atol=0.0)


def quadratic(name: str, steps: int = 60, size: int = 5000) -> tuple[AdamW, nn.Parameter, torch.Tensor]:
    """Some steps towards a target, from nought; more weights than bitsandbytes leaves in 32 bits."""
    torch.manual_seed(1)
    target = torch.randn(2, size // 2)
    weight, bias = nn.Parameter(torch.zeros(2, size // 2)), nn.Parameter(torch.zeros(3))
    optimizer = AdamW([weight, bias], name=name)
    for _ in range(steps):
        optimizer.zero_grad()
        ((weight - target).square().sum() + bias.sum()).backward()
        optimizer.step(0.05)
    return optimizer, weight, target


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_bitsandbytes_optimizers_go_where_adamw_goes_and_their_state_through_safetensors(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    _, ours, target = quadratic("adamw")
    optimizer, theirs, _ = quadratic(name)
    # fp32 moments round otherwise; of 8-bit ones 2 % of a step of 0.05, over 60 steps of which later ones correct earlier ones.
    tolerance = 0.1 if name.endswith("8bit") else 1e-4
    assert (ours - target).abs().mean() < 0.5 * target.abs().mean()
    torch.testing.assert_close(theirs, ours, rtol=0.0, atol=tolerance)
    state = optimizer.state_dict()
    assert any(value.dtype == torch.uint8 for value in state.values()) == name.endswith("8bit")
    resumed, weight, _ = quadratic(name, steps=1)
    with torch.no_grad():
        resumed.weights.copy_(optimizer.weights)
    resumed.load_state_dict(load(save(state)))
    for one in (optimizer, resumed):
        one.gradients.fill_(0.25)
        one.step(0.05)
    assert torch.equal(weight, theirs)


def test_another_optimizer_s_state_and_one_of_other_sizes_are_refused() -> None:
    pytest.importorskip("bitsandbytes")
    for name, other in (("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")):
        with pytest.raises(InputError, match="optimizer state.*expected that of this optimizer"):
            quadratic(name, steps=1)[0].load_state_dict(quadratic(other, steps=1)[0].state_dict())
        with pytest.raises(InputError, match="optimizer state"):
            quadratic(name, steps=1)[0].load_state_dict(quadratic(name, steps=1, size=6000)[0].state_dict())


def test_an_optimizer_whose_package_is_missing_or_that_takes_no_fp64_names_the_mend(monkeypatch) -> None:
    with pytest.raises(ConfigError, match="fp64"):
        AdamW([nn.Parameter(torch.ones(2, dtype=torch.float64))], name="adamw_8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="paged_adamw.*pip install bitsandbytes"):
        AdamW([nn.Parameter(torch.ones(2))], name="paged_adamw")


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
