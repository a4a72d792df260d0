"""The confidence-weighted DPO loss against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import simulated_cuda
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from srcfast_kernels import linear_weighted_dpo, weighted_dpo, weighted_dpo_loss
from srcfast_kernels.weighted_dpo import linear_weighted_dpo_reference

BETA = 0.3


def pairs(count: int, seed: int = 0) -> list[Tensor]:
    """Policy chosen, rejected, reference chosen, rejected, confidence: [P] each in fp64."""
    generator = torch.Generator().manual_seed(seed)
    logps = [-10.0 * torch.rand(count, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [*logps, 0.05 + 0.95 * torch.rand(count, generator=generator, dtype=torch.float64)]


def by_hand(values: list[Tensor], loss_type: str, smoothing: float) -> float:
    total = 0.0
    for chosen, rejected, ref_chosen, ref_rejected, weight in zip(*(v.tolist() for v in values), strict=True):
        delta = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
        sigmoid = 1.0 / (1.0 + math.exp(-delta))
        loss = {
            "sigmoid": -(1.0 - smoothing) * math.log(sigmoid) - smoothing * math.log(1.0 - sigmoid),
            "ipo": (delta / BETA - 1.0 / (2.0 * BETA)) ** 2,
            "hinge": max(0.0, 1.0 - delta),
        }[loss_type]
        total += weight * loss
    return total / sum(values[4].tolist())


@pytest.mark.parametrize(("loss_type", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0)])
def test_the_loss_is_its_formula_and_its_gradient_that_of_the_formula(loss_type: str, smoothing: float) -> None:
    values = pairs(7)
    for value in values[:2]:
        value.requires_grad_()
    settings: dict[str, Any] = {"beta": BETA, "loss_type": loss_type, "label_smoothing": smoothing}
    output = weighted_dpo_loss(*values, **settings)
    assert output.loss.item() == pytest.approx(by_hand([v.detach() for v in values], loss_type, smoothing), rel=1e-12)
    assert torch.autograd.gradcheck(lambda c, r: weighted_dpo_loss(c, r, *values[2:], **settings).loss, values[:2])


def test_smoothing_may_differ_from_pair_to_pair() -> None:
    values = pairs(5)
    smoothing = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    together = weighted_dpo_loss(*values, beta=BETA, label_smoothing=smoothing).loss
    alone = [
        weighted_dpo_loss(*(v[i : i + 1] for v in values), beta=BETA, label_smoothing=float(smoothing[i])).loss
        for i in range(5)
    ]
    expected = (torch.stack(alone) * values[4]).sum() / values[4].sum()
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=0.0)


def test_rewards_are_the_scaled_log_ratios_without_gradient() -> None:
    values = pairs(4)
    values[0].requires_grad_()
    output = weighted_dpo_loss(*values, beta=BETA)
    torch.testing.assert_close(output.chosen_rewards, BETA * (values[0] - values[2]).detach())
    torch.testing.assert_close(output.rejected_rewards, BETA * (values[1] - values[3]))
    assert not output.chosen_rewards.requires_grad and not output.rejected_rewards.requires_grad


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_a_split_batch_with_the_global_normalizer_gives_the_whole_gradient(cut: int) -> None:
    values = pairs(9, seed=1)
    gradients = []
    for parts in ([slice(0, 9)], [slice(0, cut), slice(cut, 9)]):
        chosen, rejected = (value.clone().requires_grad_() for value in values[:2])
        total = values[4].sum()
        for part in parts:
            rest = [value[part] for value in values[2:]]
            weighted_dpo_loss(chosen[part], rejected[part], *rest, beta=BETA, normalizer=total).loss.backward()
        gradients.append((chosen.grad, rejected.grad))
    for whole, split in zip(*gradients, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-13, atol=0.0)


def test_a_pair_counts_as_its_confidence_says() -> None:
    """Doubling a weight is the same as showing the pair twice; equal weights are none."""
    values = pairs(3, seed=2)
    values[4] = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    twice = [value[[0, 1, 1, 2]] for value in values]
    twice[4] = torch.full((4,), 0.77, dtype=torch.float64)
    ours, plain = (weighted_dpo_loss(*v, beta=BETA).loss for v in (values, twice))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0.0)


def test_all_weights_one_is_trl_s_sigmoid_loss() -> None:
    """TRL's per-pair loss is -logsigmoid(beta (chosen - rejected log-ratios)), averaged; the same through its trainer:
    tests/unit/stages/test_trl.py."""
    values = pairs(6, seed=3)
    ours = weighted_dpo_loss(*values[:4], torch.ones(6, dtype=torch.float64), beta=BETA).loss
    ratios = (values[0] - values[2]) - (values[1] - values[3])
    torch.testing.assert_close(ours, -torch.nn.functional.logsigmoid(BETA * ratios).mean(), rtol=1e-12, atol=0.0)


def test_extreme_margins_stay_finite() -> None:
    chosen = torch.tensor([-1e4, 0.0], requires_grad=True)
    zeros = torch.zeros(2)
    output = weighted_dpo_loss(chosen, torch.tensor([0.0, -1e4]), zeros, zeros, torch.ones(2), beta=1.0)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(5e3) and bool(torch.isfinite(chosen.grad).all())  # type: ignore[union-attr]


def test_an_unknown_loss_and_smoothing_of_another_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="kto"):
        weighted_dpo_loss(*pairs(2), beta=BETA, loss_type="kto")  # type: ignore[arg-type]
    for loss_type in ("ipo", "hinge"):
        with pytest.raises(ValueError, match=loss_type):
            weighted_dpo_loss(*pairs(2), beta=BETA, loss_type=loss_type, label_smoothing=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("trained_head", [False, True])
def test_from_hidden_states_it_equals_the_reference(trained_head: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    rows, size, vocabulary, count = 29, 6, 19, 3
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rows, size), (vocabulary, size))
    ]
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    sequence_ids = torch.cat(  # 2 count and above: tokens that both responses of a pair begin with
        [torch.arange(3 * count), torch.randint(3 * count, (rows - 3 * count,), generator=generator)]
    )
    ref_chosen, ref_rejected, confidence = pairs(count)[2:]
    results = []
    for function in (linear_weighted_dpo, linear_weighted_dpo_reference):
        hidden, weight = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_(trained_head)
        output = function(hidden, weight, targets, sequence_ids, ref_chosen, ref_rejected, confidence, beta=BETA)
        loss = output if isinstance(output, Tensor) else output.loss
        loss.backward()
        results.append([loss.detach(), hidden.grad, *([weight.grad] if trained_head else [])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)  # fp64


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_tokens_that_both_responses_begin_with_count_as_if_each_response_had_them(loss_type: Any) -> None:
    """Loss, rewards, log-probabilities and gradients, also of terms added on the log-probabilities; in fp64."""
    generator = torch.Generator().manual_seed(6)
    head = torch.randn(19, 6, generator=generator, dtype=torch.float64)
    rows = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(19, (12,), generator=generator)
    once = torch.tensor(
        [4, 4, 0, 0, 1, 5, 2, 3, 3, 3, 2, 1]
    )  # 4 and 5: shared by the responses of pair 0 and of pair 1
    twice = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 5])  # the shared rows once more, for the rejected
    ids = torch.cat([torch.where(once == 4, 0, torch.where(once == 5, 2, once)), torch.tensor([1, 1, 3])])
    rest = pairs(2, seed=7)[2:]
    results = []
    for index, sequence_ids in ((torch.arange(12), once), (twice, ids)):
        hidden = rows.clone().requires_grad_()
        output = linear_weighted_dpo(
            hidden[index], head, targets[index], sequence_ids, *rest, beta=BETA, loss_type=loss_type
        )
        (
            output.loss + (output.chosen_logps * torch.tensor([0.3, -0.8])).sum() - 0.7 * output.rejected_logps[1]
        ).backward()
        results.append([*(value.detach() for value in output), hidden.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_outputs_are_three_values_by_whatever_name() -> None:
    hidden, weight, ids = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 0, 1])
    given = (torch.tensor([-3.0]), torch.tensor([-4.0]), torch.tensor([0.5]))
    output = linear_weighted_dpo(hidden, weight, torch.tensor([1, 2, 3, 4]), ids, *given, beta=0.1)
    loss, chosen_rewards, rejected_rewards = output
    assert loss is output.loss and chosen_rewards is output.chosen_rewards
    again = weighted_dpo_loss(output.chosen_logps, output.rejected_logps, *given, beta=0.1)
    assert len(again) == 3 and torch.equal(again.loss, loss) and torch.equal(again.rejected_rewards, rejected_rewards)


def test_a_pair_of_confidence_0_adds_nothing_to_the_loss() -> None:
    values = pairs(3, seed=8)
    values[4][1] = 0.0
    without = [value[[0, 2]] for value in values]
    torch.testing.assert_close(
        weighted_dpo_loss(*values, beta=BETA).loss, weighted_dpo_loss(*without, beta=BETA).loss, rtol=1e-12, atol=0.0
    )


def test_its_head_takes_the_options_of_linear_logprob() -> None:
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((4, 5), (7, 5)))
    targets, ids = torch.tensor([1, -1, 2, 3]), torch.tensor([0, 0, 1, 1])
    zero, one = torch.zeros(1), torch.ones(1)
    both = [
        linear_weighted_dpo(h, weight, t, i, zero, zero, one, beta=BETA, ignore_index=-1, softcap=2.0).loss
        for h, t, i in ((hidden, targets, ids), (hidden[[0, 2, 3]], targets[[0, 2, 3]], ids[[0, 2, 3]]))
    ]
    torch.testing.assert_close(both[0], both[1])


def test_log_probabilities_in_half_precision_give_a_loss_in_fp32() -> None:
    halves = [part.bfloat16() for part in pairs(9)]
    output = weighted_dpo_loss(*halves, beta=BETA)
    exact = weighted_dpo_loss(*(part.double() for part in halves), beta=BETA)
    for ours, theirs in zip(output, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


class Operations(TorchDispatchMode):
    """Counts the operations that a device would be given: all but views and empty tensors."""

    none = frozenset(
        {"alias", "detach", "expand", "new_empty", "empty_like", "promote_types", "select", "slice", "view"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::").partition(".")[0]
        self.names += [] if name in self.none else [name]
        return function(*args, **(kwargs or {}))


def test_the_kernel_stands_in_for_most_operations_from_log_probabilities_to_their_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/kernels.md gives both numbers. The kernel's launch is left out: its interpreter copies what it is given."""
    count, rows = 8, 100
    monkeypatch.setattr(weighted_dpo, "token_dpo_kernel", {(count,): lambda *given, **constants: None})
    rest = [value.float() for value in pairs(count)[2:]]
    ids = torch.arange(rows) % (3 * count)

    def fused(logps: Tensor) -> Tensor:
        return weighted_dpo._TokenDPO.apply(logps, ids, *rest, 3.0, BETA, 0.0, "sigmoid")[0]

    def separate(logps: Tensor) -> Tensor:
        sums = weighted_dpo.sum_pairs(logps, ids, count)
        return weighted_dpo_loss(*sums, *rest, beta=BETA, normalizer=3.0).loss

    counts = []
    for function in (fused, separate):
        logps = torch.zeros(rows, requires_grad=True)
        with Operations() as operations:
            function(logps).backward()
        counts.append(len(operations.names))
    assert counts[0] <= 12 and counts[1] >= 25, counts


@pytest.mark.simulated
def test_by_the_fused_kernel_no_number_is_copied_to_the_device() -> None:
    """Numbers of the call are filled in there: a copy would start from memory that can be paged, and be waited for."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(size, 8, generator=generator).cuda() for size in (9, 11))
    targets = torch.randint(0, 11, (9,), generator=generator).cuda()
    sequence_ids = (torch.arange(9) % 4).cuda()
    references = [torch.randn(2, generator=generator).cuda() for _ in range(2)]
    confidence = torch.tensor([0.25, 0.75]).cuda()
    hidden.requires_grad_()
    with simulated_cuda.recording() as record:
        for smoothing, normalizer in ((0.0, 3.0), (0.1, None), ((1 - confidence) / 2, confidence.sum())):
            output = linear_weighted_dpo(
                hidden,
                weight,
                targets,
                sequence_ids,
                *references,
                confidence,
                beta=BETA,
                label_smoothing=smoothing,
                normalizer=normalizer,
            )
            output.loss.backward()
    assert record.launches["token_dpo_kernel"] == 3
    assert not record.waits and not record.pageable_copies, record.text()
