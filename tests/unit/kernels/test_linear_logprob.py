"""linear_logprob against its definition, its gradients against finite differences."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srcfast_kernels import linear_logprob
from srcfast_kernels.backends import use_backend
from srcfast_kernels.linear_logprob import linear_logprob_reference

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.37},
    "softcap": {"softcap": 1.9},
    "all": {"bias": True, "logit_scale": 1.6, "softcap": 2.3},
}


def problem(rows: int, size: int, vocabulary: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, size, generator=generator, dtype=dtype) / size**0.5
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[::5] = -100
    return hidden, weight, bias, targets


def options(head: str, bias: Tensor) -> dict[str, Any]:
    return {**HEADS[head], **({"bias": bias} if "bias" in HEADS[head] else {})}


@pytest.fixture(params=[1 << 22, 40], ids=["one chunk", "many chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["srcfast_kernels.linear_logprob"], "CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(sys.modules["srcfast_kernels.linear_logprob"], "LEAST_CHUNK_ROWS", 1)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
def test_gradients_equal_finite_differences(head: str, trained: str, chunk: None) -> None:
    hidden, weight, bias, targets = problem(7, 5, 13, seed=len(head))
    hidden.requires_grad_(trained != "head")
    for part in (weight, bias):
        part.requires_grad_(trained != "hidden")
    own = options(head, bias)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, targets, **{**own, **({"bias": bias} if "bias" in own else {})})

    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_equal_the_reference(head: str, chunk: None) -> None:
    hidden, weight, bias, targets = problem(11, 6, 17, seed=3)
    results = []
    for function in (linear_logprob, linear_logprob_reference):
        parts = [part.clone().requires_grad_() for part in (hidden, weight, bias)]
        logps = function(parts[0], parts[1], targets, **options(head, parts[2]))
        (logps * torch.arange(11.0, dtype=torch.float64)).sum().backward()
        results.append([logps, *(part.grad for part in parts if part.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # fp64, a few dozen terms


@given(
    rows=st.integers(0, 9),
    size=st.integers(1, 9),
    vocabulary=st.integers(1, 23),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_in_fp32(rows: int, size: int, vocabulary: int, seed: int) -> None:
    hidden, weight, _, targets = problem(rows, size, vocabulary, seed, torch.float32)
    logps = linear_logprob(hidden, weight, targets)
    expected = linear_logprob_reference(hidden.double(), weight.double(), targets)
    assert logps.dtype == torch.float32 and logps.shape == (rows,)
    assert bool((logps <= 0).all())
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_rows_still_give_a_gradient_of_no_rows() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    weight = torch.randn(7, 4, requires_grad=True)
    linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 4)
    assert weight.grad is not None and not weight.grad.any()


def test_ignored_rows_count_for_nothing_whatever_they_hold() -> None:
    hidden, weight, _, targets = problem(10, 4, 9, seed=1)
    hidden.requires_grad_()
    logps = linear_logprob(hidden, weight, targets)
    logps.sum().backward()
    assert hidden.grad is not None
    ignored = targets == -100
    assert not logps[ignored].any() and not hidden.grad[ignored].any() and bool(hidden.grad[~ignored].any(-1).all())
    other = linear_logprob(hidden.detach(), weight, targets.where(~ignored, 3), ignore_index=3)
    assert torch.equal(other[~ignored & (targets != 3)], logps[~ignored & (targets != 3)])


def test_a_certain_token_is_never_above_zero_and_large_logits_stay_finite() -> None:
    hidden = torch.full((3, 1), 50.0, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.999]])
    logps = linear_logprob(hidden, weight, torch.tensor([0, 1, 2]))
    assert bool((logps <= 0).all()) and logps[1].item() == pytest.approx(-100.6684, abs=1e-3)
    large = linear_logprob(torch.full((2, 1), 3e4), weight, torch.tensor([0, 1]))
    assert large[0].item() == 0.0 and bool(torch.isfinite(large).all())


def test_repeated_rows_give_equal_results_and_add_up() -> None:
    """Rows of a shared prefix are gathered several times."""
    hidden, weight, _, _ = problem(4, 5, 11, seed=2)
    hidden.requires_grad_()
    rows, targets = torch.tensor([1, 1, 1, 3]), torch.tensor([4, 4, 7, 4])
    logps = linear_logprob(hidden[rows], weight, targets)
    assert logps[0] == logps[1]
    logps.sum().backward()
    expected = hidden.detach().clone().requires_grad_()
    linear_logprob_reference(expected[rows], weight, targets).sum().backward()
    torch.testing.assert_close(hidden.grad, expected.grad, rtol=1e-12, atol=1e-12)
    assert hidden.grad is not None and not hidden.grad[[0, 2]].any()


@pytest.mark.parametrize("trained_head", [False, True])
def test_bf16_inputs_are_reduced_in_fp32(trained_head: bool) -> None:
    hidden, weight, _, targets = problem(33, 48, 101, seed=4, dtype=torch.float32)
    narrow = [part.bfloat16() for part in (hidden, weight)]
    wide = [part.float() for part in narrow]
    for parts in (narrow, wide):
        parts[0].requires_grad_()
        parts[1].requires_grad_(trained_head)
    ours = linear_logprob(narrow[0], narrow[1], targets)
    exact = linear_logprob_reference(wide[0], wide[1], targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)  # the inputs are the same numbers
    ours.sum().backward(), exact.sum().backward()
    for narrow_part, wide_part in zip(narrow, wide, strict=True):
        if wide_part.grad is not None:
            assert narrow_part.grad is not None and narrow_part.grad.dtype == torch.bfloat16
            # residual and result are rounded to 8 bits once each
            error = (narrow_part.grad.float() - wide_part.grad).abs().max() / wide_part.grad.abs().max()
            assert float(error) < 0.01


def test_autocast_changes_nothing() -> None:
    hidden, weight, _, targets = problem(9, 16, 31, seed=5, dtype=torch.float32)
    hidden.requires_grad_()
    plain = linear_logprob(hidden, weight, targets)
    plain.sum().backward()
    gradient, hidden.grad = hidden.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_logprob(hidden, weight, targets)
        cast.sum().backward()
    assert torch.equal(cast, plain) and torch.equal(hidden.grad, gradient)  # type: ignore[arg-type]


def test_without_gradients_nothing_is_formed_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["srcfast_kernels.linear_logprob"]
    asked = []
    rows = module._rows
    monkeypatch.setattr(module, "_rows", lambda *a: asked.append(a[5]) or rows(*a))
    hidden = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        linear_logprob(hidden, torch.randn(5, 4), torch.tensor([0, 1, 4]))
    linear_logprob(hidden, torch.randn(5, 4), torch.tensor([0, 1, 4]))
    assert asked == [None, torch.float32]


@pytest.mark.parametrize("rows", [33, 66, 104])
def test_gradients_of_bf16_inputs_are_finite_whatever_lies_behind_a_row(rows: int) -> None:
    """oneDNN's products of bf16 on a CPU with AMX read rows of other lengths than multiples of 32 to such a multiple."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(581, 128, generator=generator).bfloat16()
    for _ in range(4):
        hidden = torch.randn(rows, 128, generator=generator).bfloat16().requires_grad_()
        linear_logprob(hidden, weight, torch.arange(rows)).sum().backward()
        assert hidden.grad is not None and bool(hidden.grad.isfinite().all())


@pytest.mark.parametrize("vocabulary", [3, 70, 301])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_zeros_follow_each_row_of_bf16_residuals(backend: str, vocabulary: int) -> None:
    module = sys.modules["srcfast_kernels.linear_logprob"]
    logits, targets = torch.randn(5, vocabulary), torch.randint(vocabulary, (5,))
    _, residual = module._rows(backend, logits, targets, None, module.HeadSettings(), torch.bfloat16, None)
    assert residual.shape == (5, vocabulary) and bool((residual != 0).any(1).all())
    behind = logits.view(torch.bfloat16)[:, vocabulary:][:, :32]
    assert behind.shape[1] == min(32, vocabulary) and bool((behind == 0).all())


def test_bf16_logits_keep_fp32_s_precision() -> None:
    hidden, weight, _, targets = problem(300, 512, 5000, seed=6, dtype=torch.float32)
    hidden, weight = 3.0 * hidden.bfloat16(), weight.bfloat16()
    exact = linear_logprob_reference(hidden.double(), weight.double(), targets)
    # Sums of 512 fp32 products of about 1: a few units of 2^-24 times their number's root; a bf16 logit would err by 0.03.
    torch.testing.assert_close(linear_logprob(hidden, weight, targets).double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("ignored", [-100, -1, 0, 3])
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_the_target_that_doesn_t_count_is_the_one_that_is_named(ignored: int, backend: Any) -> None:
    """One row after the other in plain Python; a token of the vocabulary may be the one that doesn't count."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    targets = torch.tensor([1, 3, 0, 4, 3, 2])
    if ignored < 0:
        targets[[0, 4]] = ignored
    with use_backend(backend):
        logps = linear_logprob(hidden, weight, targets, ignore_index=ignored)
        (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    for row, target in enumerate(targets.tolist()):
        logits = [float(hidden[row].detach() @ weight[token]) for token in range(5)]
        shares = [math.exp(one) / sum(math.exp(other) for other in logits) for one in logits]
        counts = target != ignored
        assert logps[row].item() == pytest.approx(math.log(shares[target]) if counts else 0.0, abs=1e-12)
        slope = [(token == target) - share for token, share in enumerate(shares)]
        expected = [sum(s * float(weight[t, d]) for t, s in enumerate(slope)) if counts else 0.0 for d in range(4)]
        assert gradient[row].tolist() == pytest.approx(expected, abs=1e-12)
