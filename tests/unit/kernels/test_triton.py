"""Every Triton kernel against its reference, in fp64 and fp32; interpreted where no GPU is.

In fp64 both sides round to 1e-16 and sum a few hundred terms: 1e-12. In fp32: 1e-5 of the largest value.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from srcfast_kernels import (
    linear_logprob,
    linear_weighted_dpo,
    nf4_dequantize,
    nf4_quantize,
    pairwise_verdict,
    rms_norm,
    rope,
    swiglu,
)
from srcfast_kernels.backends import backend_for, use_backend
from srcfast_kernels.linear_logprob import linear_logprob_reference
from srcfast_kernels.lora_linear import Adapted, Norm, lora_linears, swiglu_lora_linear
from srcfast_kernels.pairwise_verdict import pairwise_verdict_reference
from srcfast_kernels.rms_norm import rms_norm_reference
from srcfast_kernels.rope import rope_reference
from srcfast_kernels.swiglu import swiglu_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.fixture(params=DTYPES, ids=["fp64", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def close(ours: Tensor, theirs: Tensor) -> None:
    largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=DTYPES[ours.dtype] * max(1.0, largest))


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def test_a_backend_is_forced_by_name_and_found_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1)
    assert backend_for(tensor) == "triton"
    with use_backend("reference"):
        assert backend_for(tensor) == "reference"
    monkeypatch.setattr(sys.modules["srcfast_kernels.backends"], "_forced", None)
    assert backend_for(tensor) == "torch"
    monkeypatch.setenv("SRCFAST_KERNELS", "reference")
    assert backend_for(tensor) == "reference"
    monkeypatch.setenv("SRCFAST_KERNELS", "cuda")
    with pytest.raises(ValueError, match="SRCFAST_KERNELS: expected auto, triton, torch, reference, found 'cuda'"):
        backend_for(tensor)


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"bias": True, "logit_scale": 1.6, "softcap": 2.3},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("trained", ["hidden", "both"])
@pytest.mark.parametrize("block", [8, 4096], ids=["many blocks", "one block"])
def test_linear_logprob(
    head: str, trained: str, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["srcfast_kernels.linear_logprob"]
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 4 * 37)
    monkeypatch.setattr(module, "LEAST_CHUNK_ROWS", 1)
    targets = torch.tensor([0, 36, -100, 5, 5, 17, -100, 8, 35], device=DEVICE)
    results = []
    for function in (linear_logprob, linear_logprob_reference):
        hidden, weight = random(9, 6, dtype=dtype, seed=1), random(37, 6, dtype=dtype, seed=2)
        bias = random(37, dtype=dtype, seed=3)
        hidden.requires_grad_()
        for part in (weight, bias):
            part.requires_grad_(trained == "both")
        own = HEADS[head] | ({"bias": bias} if "bias" in HEADS[head] else {})
        logps = function(hidden, weight, targets, **own)
        (logps * random(9, dtype=dtype, seed=4)).sum().backward()
        results.append([logps, *(part.grad for part in (hidden, weight, bias) if part.grad is not None)])
    assert len(results[0]) == len(results[1])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("programs", [1, 132], ids=["one split", "many splits"])
def test_linear_logprob_by_tiles(head: str, programs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["srcfast_kernels.linear_logprob_tiled"], "PROGRAMS", programs)
    targets = torch.randint(101, (35,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[[3, 34]] = -100
    own = HEADS[head] | ({"bias": random(101, dtype=dtype, seed=3)} if "bias" in HEADS[head] else {})
    results = []
    for options in ({"method": "tiled"}, {"method": "chunked"}):
        hidden = random(35, 45, dtype=dtype, seed=1).requires_grad_()
        logps = linear_logprob(hidden, random(101, 45, dtype=dtype, seed=2), targets, **own, **options)
        (logps * random(35, dtype=dtype, seed=4)).sum().backward()
        assert hidden.grad is not None
        results.append((logps, hidden.grad))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)
    assert not linear_logprob(hidden[:0], random(101, 45, dtype=dtype, seed=2), targets[:0], method="tiled").numel()


def test_a_head_that_is_trained_is_refused_by_tiles() -> None:
    weight = torch.zeros(3, 4, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="expected 'chunked' for a head that is trained, found 'tiled'"):
        linear_logprob(torch.zeros(2, 4, device=DEVICE), weight, torch.tensor([0, 1], device=DEVICE), method="tiled")


def test_linear_logprob_of_large_logits_is_finite_and_never_above_zero() -> None:
    weight = torch.tensor([[1.0], [-1.0], [0.999]], device=DEVICE)
    targets = torch.tensor([0, 1], device=DEVICE)
    for size, options in ((3e4, {}), (50.0, {"softcap": 30.0}), (3e6, {"softcap": 30.0})):
        hidden = torch.full((2, 1), size, device=DEVICE, requires_grad=True)
        logps = linear_logprob(hidden, weight, targets, **options)
        logps.sum().backward()
        assert bool((logps <= 0).all()) and bool(torch.isfinite(logps).all())
        assert hidden.grad is not None and bool(torch.isfinite(hidden.grad).all())


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("normalizer", [None, 7.5])
def test_linear_weighted_dpo(
    loss_type: Any, normalizer: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["srcfast_kernels.weighted_dpo"], "BLOCK", 4)
    lengths = torch.tensor([5, 9, 1, 4, 0, 6, 7, 0, 2])  # of three pairs, an empty response, too; then what each shares
    generator = torch.Generator().manual_seed(5)
    ids = torch.arange(9).repeat_interleave(lengths)[torch.randperm(34, generator=generator)].to(DEVICE)
    targets = torch.randint(11, (34,), generator=generator).to(DEVICE)
    terms = random(2, 3, dtype=dtype, seed=11)  # what is added to the loss, of each log-probability
    confidence = random(3, dtype=dtype, seed=6).sigmoid()
    smoothing = torch.tensor([0.1, 0.0, 0.3], dtype=dtype, device=DEVICE) if loss_type == "sigmoid" else 0.0
    results = []
    for backend in ("triton", "torch"):
        hidden = random(34, 6, dtype=dtype, seed=7).requires_grad_()
        with use_backend(backend):  # type: ignore[arg-type]
            output = linear_weighted_dpo(
                hidden,
                random(11, 6, dtype=dtype, seed=8),
                targets,
                ids,
                random(3, dtype=dtype, seed=9) - 20,
                random(3, dtype=dtype, seed=10) - 20,
                confidence,
                beta=0.3,
                label_smoothing=smoothing,
                loss_type=loss_type,
                normalizer=normalizer,
            )
            logps = (output.chosen_logps, output.rejected_logps)
            losses = [3.0 * output.loss, (terms[0] * logps[0]).sum(), (terms[1] * logps[1]).sum()]
            losses += [losses[0] + losses[1], losses[1] + losses[2]]  # what training adds; without the loss itself
            gradients = [torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in losses]
        results.append([*(value.detach() for value in output), *gradients])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


def test_label_smoothing_of_another_loss_is_refused() -> None:
    one = torch.zeros(1, device=DEVICE)
    ids = torch.tensor([0, 1], device=DEVICE)
    with pytest.raises(ValueError, match="label_smoothing is defined for loss_type 'sigmoid', not 'hinge'"):
        linear_weighted_dpo(
            torch.zeros(2, 3, device=DEVICE), torch.zeros(5, 3, device=DEVICE), ids, ids, one, one, one + 1,
            beta=0.1, label_smoothing=0.2, loss_type="hinge",
        )  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("candidates", [[2], [5, 1, 3, 4], [17]])
def test_pairwise_verdict(candidates: list[int], softcap: float | None, dtype: torch.dtype) -> None:
    """Of each sample the reference's, with some comparisons missing, ties among them, in any order."""
    generator = torch.Generator().manual_seed(sum(candidates))
    rows = [
        (sample, i, j)
        for sample, n in enumerate(candidates)
        for i in range(n)
        for j in range(n)
        if i != j and torch.rand((), generator=generator) < 0.9
    ]
    sample, first, second = torch.tensor(rows)[torch.randperm(len(rows), generator=generator)].T.contiguous().to(DEVICE)
    hidden, weight = random(len(rows), 150, dtype=dtype, seed=1), random(3, 150, dtype=dtype, seed=2) / 10
    hidden[first < second] = 0.0  # neutral verdicts
    values = torch.tensor([1.0, 0.5, 0.0], dtype=dtype, device=DEVICE)
    ours = pairwise_verdict(
        hidden,
        weight,
        first,
        second,
        torch.tensor(candidates, device=DEVICE),
        verdict_values=values,
        sample_ids=sample,
        softcap=softcap,
    )
    for number in range(len(candidates)):
        own = sample == number
        theirs = pairwise_verdict_reference(
            hidden[own], weight, first[own], second[own], max(candidates), verdict_values=values, softcap=softcap
        )
        for found, expected in zip(ours, theirs, strict=True):
            close(found[number], expected.to(dtype).to(DEVICE))


@pytest.mark.parametrize("shape", [(64, 96), (7, 33), (1,), (4097,)])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_dequantize_bit_for_bit(shape: tuple[int, ...], blocksize: int, double_quant: bool) -> None:
    weight = nf4_quantize(
        random(*shape, dtype=torch.float32, seed=len(shape)), blocksize=blocksize, double_quant=double_quant
    )
    ours = nf4_dequantize(weight)
    with use_backend("torch"):
        assert torch.equal(ours, nf4_dequantize(weight))


@pytest.mark.parametrize("dtype16", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "blocksize"), [((5, 31), 64), ((3, 4096), 4096), ((67, 33), 32), ((1, 1), 128)])
def test_nf4_quantize_bit_for_bit(shape: tuple[int, ...], blocksize: int, dtype16: torch.dtype) -> None:
    weight = random(*shape, dtype=torch.float32, seed=len(shape)).to(dtype16)
    weight[0] *= 0.0
    ours = nf4_quantize(weight, blocksize=blocksize, double_quant=False)
    with use_backend("torch"):
        theirs = nf4_quantize(weight, blocksize=blocksize, double_quant=False)
    assert torch.equal(ours.packed, theirs.packed) and torch.equal(ours.absmax, theirs.absmax)


def gradients(function: Any, parts: list[Tensor], seed: int) -> list[Tensor]:
    """The function's value, and the gradients of those parts that require one, under a random outer gradient."""
    parts = [part.detach().clone().requires_grad_(part.requires_grad) for part in parts]
    value = function(*parts)
    (value * random(*value.shape, dtype=value.dtype, seed=seed)).sum().backward()
    return [value, *(part.grad for part in parts if part.grad is not None)]


@pytest.mark.parametrize("shape", [(7, 37), (3, 2, 64), (0, 5)])
@pytest.mark.parametrize("trained_weight", [False, True])
def test_rms_norm(shape: tuple[int, ...], trained_weight: bool, dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype, seed=1).requires_grad_()
    weight = random(shape[-1], dtype=dtype, seed=2).requires_grad_(trained_weight)
    for ours, theirs in zip(
        gradients(rms_norm, [x, weight], 3), gradients(rms_norm_reference, [x, weight], 3), strict=True
    ):
        close(ours, theirs)


def test_rms_norm_sums_the_weight_s_gradient_over_programs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["srcfast_kernels.rms_norm"], "PROGRAMS", 3)
    x, weight = random(11, 6, dtype=dtype, seed=1).requires_grad_(), random(6, dtype=dtype, seed=2).requires_grad_()
    for ours, theirs in zip(
        gradients(rms_norm, [x, weight], 3), gradients(rms_norm_reference, [x, weight], 3), strict=True
    ):
        close(ours, theirs)


@pytest.mark.parametrize("heads", [1, 3, 11])
def test_rope(heads: int, dtype: torch.dtype) -> None:
    """Also of queries that are a part of a wider tensor, as after one product for q, k and v."""
    angles = random(5, 6, dtype=dtype, seed=1)
    cos, sin = (torch.cat([part, part], dim=-1) for part in (angles.cos(), angles.sin()))
    wide = random(5, heads + 2, 12, dtype=dtype, seed=2).requires_grad_()

    def turned(function: Any) -> list[Tensor]:
        return gradients(lambda x: function(x[:, 1 : heads + 1], cos, sin), [wide], 3)

    for ours, theirs in zip(turned(rope), turned(rope_reference), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("shape", [(1,), (9, 300), (0, 4)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = [random(*shape, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2)]
    for ours, theirs in zip(gradients(swiglu, parts, 3), gradients(swiglu_reference, parts, 3), strict=True):
        close(ours, theirs)


def lora_layer(x: Tensor, *adapters: Tensor) -> Tensor:
    """Norm, gate and up, gated activation and down: by Triton where an operation of it has a kernel."""
    size, inner, dtype = x.shape[-1], adapters[1].shape[0], x.dtype
    gate, up, down = (
        random(out, into, dtype=dtype, seed=out) for out, into in ((inner, size), (inner, size), (size, inner))
    )
    pairs = [Adapted(gate, None, *adapters[:2], 0.5), Adapted(up, None, *adapters[2:4], 2.0)]
    middle = lora_linears(x, pairs, Norm(random(size, dtype=dtype, seed=9), 1e-3))
    return swiglu_lora_linear(*middle, Adapted(down, None, *adapters[4:], 1.5))


LORA_LAYER: list[tuple[int, ...]] = [(3, 5), (2, 5), (7, 2), (1, 5), (7, 1), (2, 7), (5, 2)]


def test_layers_with_adapters(dtype: torch.dtype) -> None:
    parts = [random(*shape, dtype=dtype, seed=20 + n).requires_grad_() for n, shape in enumerate(LORA_LAYER)]
    ours = gradients(lora_layer, parts, 3)
    with use_backend("reference"):
        theirs = gradients(lora_layer, parts, 3)
    for own, other in zip(ours, theirs, strict=True):
        close(own, other)


DIFFERENTIATED: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    "rms_norm": (rms_norm, [(3, 7), (7,)]),
    "rope": (lambda x: rope(x, ANGLES.cos(), ANGLES.sin()), [(3, 2, 8)]),
    "swiglu": (swiglu, [(3, 5), (3, 5)]),
    "layers with adapters": (lora_layer, LORA_LAYER),
    "linear_logprob": (lambda hidden, weight: linear_logprob(hidden, weight, TARGETS, softcap=3.0), [(4, 5), (7, 5)]),
    "linear_logprob tiled": (
        lambda hidden: linear_logprob(hidden, random(7, 5, dtype=torch.float64, seed=9), TARGETS, method="tiled"),
        [(4, 5)],
    ),
    "linear_weighted_dpo": (
        lambda hidden, weight: (
            linear_weighted_dpo(
                hidden, weight, TARGETS, PAIR, *torch.zeros(2, 1, device=DEVICE), torch.ones(1, device=DEVICE), beta=0.3
            ).loss
        ),
        [(4, 5), (7, 5)],
    ),
}
ANGLES = torch.arange(12.0, dtype=torch.float64, device=DEVICE).view(3, 4).repeat(1, 2)
TARGETS, PAIR = torch.tensor([6, 0, -100, 3], device=DEVICE), torch.tensor([0, 1, 1, 0], device=DEVICE)


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_equal_finite_differences(name: str) -> None:
    function, shapes = DIFFERENTIATED[name]
    parts = [random(*shape, dtype=torch.float64, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, parts)


def apart(x: Tensor) -> Tensor:
    """The same numbers, not next to each other."""
    return torch.stack([x, torch.full_like(x, 3)], dim=-1)[..., 0]


@pytest.mark.parametrize("method", ["chunked", "tiled"])
def test_linear_logprob_of_vectors_that_are_columns_of_tables(method: Any, dtype: torch.dtype) -> None:
    hidden, weight, bias = (random(*shape, dtype=dtype, seed=n) for n, shape in enumerate([(9, 7), (23, 7), (23,)]))
    targets = torch.arange(9, device=DEVICE) % 5
    results = []
    for change in (apart, lambda x: x):
        parts = [change(hidden).detach().requires_grad_(), change(weight), change(targets)]
        logps = linear_logprob(*parts, bias=change(bias), method=method)
        logps.sum().backward()  # whose gradient is one number, expanded
        results.append((logps, parts[0].grad))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


def test_the_gradient_of_a_sum_reaches_a_trained_head(dtype: torch.dtype) -> None:
    found = []
    for function in (linear_logprob, linear_logprob_reference):
        parts = [random(*shape, dtype=dtype, seed=n).requires_grad_() for n, shape in enumerate([(9, 7), (23, 7)])]
        function(*parts, torch.arange(9, device=DEVICE)).sum().backward()
        found.append([part.grad for part in parts])
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)


def test_verdicts_of_pairs_that_are_columns_of_a_table(dtype: torch.dtype) -> None:
    table = torch.tensor([(s, i, j) for s in range(3) for i in range(4) for j in range(4) if i != j], device=DEVICE)
    samples, first, second = table.T  # strided
    hidden, weight = random(len(table), 12, dtype=dtype, seed=1), random(3, 12, dtype=dtype, seed=2)
    own = {"verdict_values": apart(torch.tensor([1.0, 0.5, 0.0], dtype=dtype, device=DEVICE)), "sample_ids": samples}
    ours = pairwise_verdict(apart(hidden), apart(weight), first, second, 4, **own)
    with use_backend("torch"):
        theirs = pairwise_verdict(hidden, weight, first, second, 4, **own)
    for found, expected in zip(ours, theirs, strict=True):
        close(found, expected)


def test_a_verdict_that_is_not_a_number_is_seen_and_not_taken_for_a_missing_one(dtype: torch.dtype) -> None:
    first, second = torch.tensor([(i, j) for i in range(3) for j in range(3) if i != j], device=DEVICE).T
    hidden = random(6, 12, dtype=dtype, seed=1)
    hidden[(first == 0) & (second == 1)] = float("nan")
    values = torch.tensor([1.0, 0.5, 0.0], dtype=dtype, device=DEVICE)
    output = pairwise_verdict(hidden, random(3, 12, dtype=dtype, seed=2), first, second, 3, verdict_values=values)
    assert output.scores.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("count", [1, 4, 5, 11])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_more_pairs_than_a_block_of_losses_add_up_by_hand(
    count: int, loss_type: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 4: the last program sums the losses of up to three of them. One pair after the other, written out."""
    monkeypatch.setattr(sys.modules["srcfast_kernels.weighted_dpo"], "BLOCK", 4)
    lengths = torch.randint(1, 11, (3 * count,), generator=torch.Generator().manual_seed(count))
    ids = torch.arange(3 * count).repeat_interleave(lengths)
    hidden, weight = random(len(ids), 6, dtype=torch.float64, seed=1), random(11, 6, dtype=torch.float64, seed=2)
    targets = torch.randint(11, (len(ids),), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    reference = random(2, count, dtype=torch.float64, seed=4) - 15
    confidence = random(count, dtype=torch.float64, seed=5).sigmoid()
    beta, epsilon = 0.3, 0.1 if loss_type == "sigmoid" else 0.0
    hidden.requires_grad_()
    output = linear_weighted_dpo(
        hidden, weight, targets, ids.to(DEVICE), *reference, confidence,
        beta=beta, loss_type=loss_type, label_smoothing=epsilon,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(output.loss, hidden)

    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for pair in range(count):
        chosen, rejected, shared = (logps[ids == own].sum() for own in (2 * pair, 2 * pair + 1, 2 * count + pair))
        ratio = (chosen + shared - reference[0, pair]) - (rejected + shared - reference[1, pair])
        loss = {
            "sigmoid": -(1 - epsilon) * (beta * ratio).sigmoid().log() - epsilon * (-beta * ratio).sigmoid().log(),
            "ipo": (ratio - 1 / (2 * beta)) ** 2,
            "hinge": (1 - beta * ratio).clamp(min=0.0),
        }[loss_type]
        total = total + confidence[pair] * loss
    total = total / confidence.sum()
    close(output.loss, total)
    close(gradient, torch.autograd.grad(total, hidden)[0])
