"""On a GPU in bf16 and fp16: no kernel errs more than twice as much as PyTorch in the same type, both against fp32.

That is flash-attention's rule. A floor of a thousandth of the type's resolution, relative to the largest value, stands where
PyTorch happens to be exact. Memory that kernels are handed is filled with NaN first, inputs are fresh in every run, and a failure
names its seed. The simulated device, which interprets kernels and fills new memory with NaN itself, is given smaller shapes; of
so few values the greatest error varies more, and three times is allowed.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import simulated_cuda
import torch
import torch.nn.functional as F
from torch import Tensor

from srcfast_kernels import (
    linear_logprob,
    linear_weighted_dpo,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
    pairwise_verdict,
    rms_norm,
    rope,
    swiglu,
    weighted_dpo_loss,
)
from srcfast_kernels.backends import use_backend
from srcfast_kernels.linear_logprob import linear_logprob_reference
from srcfast_kernels.lora_linear import Adapted, Norm, lora_linear_reference, lora_linears, swiglu_lora_linear
from srcfast_kernels.nf4_linear import why_not_fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.bfloat16, torch.float16)
SIMULATED = simulated_cuda.is_active()
TIMES = 3 if SIMULATED else 2
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def shapes(on_gpu: Any, simulated: Any) -> Any:
    """What a GPU is given, or what takes the interpreter a second; odd sizes are among both."""
    return simulated if SIMULATED else on_gpu


@pytest.fixture(params=HALVES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def seed() -> int:
    return random.randrange(1 << 30)


class Draw:
    """Normal numbers that go on from call to call, rounded to the type, so that every way is given the same."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *size: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        numbers = scale * torch.randn(*size, generator=self.generator)
        return numbers.to(DEVICE, self.dtype).requires_grad_(grad)


def poison() -> None:
    """Leave NaN in the memory that the next tensors will be given."""
    if DEVICE == "cuda" and not SIMULATED:
        blocks = [
            torch.full((count,), float("nan"), device=DEVICE) for count in (1 << 26, 1 << 22, 1 << 18, 1 << 14) * 2
        ]
        del blocks
        torch.cuda.synchronize()


def values_and_gradients(function: Function, parts: list[Tensor], seed: int) -> list[Tensor]:
    """Outputs, and gradients of the parts that require one, under random outer gradients; all in fp32."""
    own = [part.detach().clone().requires_grad_(part.requires_grad) for part in parts]
    outputs = function(*own)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    total = sum((out.float() * torch.randn(out.shape, generator=generator).to(DEVICE)).sum() for out in outputs)
    total.backward()
    return [part.detach().float() for part in (*outputs, *(part.grad for part in own if part.grad is not None))]


def no_worse_than_twice(ours: Function, theirs: Function, parts: list[Tensor], seed: int) -> None:
    """The rule; `theirs` is PyTorch's way in any type."""
    exact = values_and_gradients(
        theirs, [part.detach().float().requires_grad_(part.requires_grad) for part in parts], seed
    )
    rounded = values_and_gradients(theirs, parts, seed)
    poison()
    found = values_and_gradients(ours, parts, seed)
    assert len(found) == len(exact)
    floor = 1e-3 * torch.finfo(parts[0].dtype).eps
    for number, (own, other, true) in enumerate(zip(found, rounded, exact, strict=True)):
        assert bool(torch.isfinite(own).all()), f"value {number}, seed {seed}"
        error, allowed = (own - true).abs().max(), TIMES * (other - true).abs().max() + floor * true.abs().max()
        assert error <= allowed, f"value {number}, seed {seed}: {error:.3g} against {allowed:.3g}"


HEADS: dict[str, dict[str, Any]] = {"plain": {}, "all": {"logit_scale": 0.7, "softcap": 20.0}}


def torch_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> Tensor:
    """As trainers have it: logits in the model's type, softmax in fp32."""
    logits = head.get("logit_scale", 1.0) * (hidden @ weight.T)
    if cap := head.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    return logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", ["chunked", "tiled"])
@pytest.mark.parametrize(
    ("rows", "size", "vocabulary"),
    shapes([(257, 192, 1001), (129, 1024, 32_064), (33, 72, 151_936)], [(35, 72, 301)]),
)
def test_linear_logprob(
    rows: int, size: int, vocabulary: int, method: Any, head: str, dtype: torch.dtype, seed: int
) -> None:
    draw = Draw(seed, dtype)
    parts = [draw(rows, size, grad=True), draw(vocabulary, size, scale=size**-0.5)]
    targets = torch.randint(vocabulary, (rows,), generator=draw.generator).to(DEVICE)
    no_worse_than_twice(
        lambda hidden, weight: linear_logprob(hidden, weight, targets, method=method, **HEADS[head]),
        lambda hidden, weight: torch_logprob(hidden, weight, targets, **HEADS[head]),
        parts,
        seed,
    )


@pytest.mark.parametrize("frozen", ["weight", "none"])
def test_linear_logprob_of_a_head_with_bias(frozen: str, dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, dtype)
    trained = frozen == "none"
    rows, size, words = shapes((511, 256, 4001), (35, 72, 301))
    parts = [draw(rows, size, grad=True), draw(words, size, scale=1 / 16, grad=trained), draw(words, grad=trained)]
    targets = torch.randint(words, (rows,), generator=draw.generator).to(DEVICE)
    no_worse_than_twice(
        lambda hidden, weight, bias: linear_logprob(hidden, weight, targets, bias=bias),
        lambda hidden, weight, bias: (
            F.linear(hidden, weight, bias).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        ),
        parts,
        seed,
    )


@pytest.mark.skipif(SIMULATED, reason="the interpreter would take an hour for 2^31 logits")
def test_more_than_two_to_the_31_logits(seed: int) -> None:
    draw = Draw(seed, torch.bfloat16)
    rows, vocabulary = 16_384, 151_936  # their product is 1.16 of 2^31
    hidden, weight = draw(rows, 64, grad=True), draw(vocabulary, 64, scale=0.125)
    targets = torch.randint(vocabulary, (rows,), generator=draw.generator).to(DEVICE)
    poison()
    logps = linear_logprob(hidden, weight, targets)
    logps.sum().backward()
    last = slice(rows - 64, rows)
    exact = hidden[last].detach().float().requires_grad_()
    expected = linear_logprob_reference(exact, weight.float(), targets[last])
    expected.sum().backward()
    assert hidden.grad is not None and exact.grad is not None
    torch.testing.assert_close(logps[last], expected, rtol=0, atol=1e-4)  # fp32 sums of 152 thousand terms
    torch.testing.assert_close(hidden.grad[last].float(), exact.grad, rtol=0, atol=0.02 * float(exact.grad.abs().max()))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_linear_weighted_dpo(loss_type: Any, dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, dtype)
    longest, size, words = shapes((90, 128, 3001), (6, 72, 301))
    lengths = torch.randint(1, longest, (14,), generator=draw.generator)
    ids = torch.arange(14).repeat_interleave(lengths).to(DEVICE)
    rows = len(ids)
    targets = torch.randint(words, (rows,), generator=draw.generator).to(DEVICE)
    confidence = torch.rand(7, generator=draw.generator).to(DEVICE)
    references = -8.0 * lengths.view(7, 2).to(DEVICE, torch.float32)
    settings = {"beta": 0.1, "loss_type": loss_type}

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_weighted_dpo(hidden, weight, targets, ids, *references.unbind(1), confidence, **settings).loss

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        logps = torch_logprob(hidden, weight, targets)
        sums = logps.new_zeros(14).index_add(0, ids, logps).view(7, 2)
        return weighted_dpo_loss(*sums.unbind(1), *references.unbind(1), confidence, **settings).loss

    no_worse_than_twice(ours, theirs, [draw(rows, size, grad=True), draw(words, size, scale=size**-0.5)], seed)


@pytest.mark.parametrize(("samples", "candidates"), shapes([(64, 8), (3, 64), (5, 2)], [(3, 8), (1, 9), (5, 2)]))
def test_pairwise_verdict(samples: int, candidates: int, dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, dtype)
    pairs = [(s, i, j) for s in range(samples) for i in range(candidates) for j in range(candidates) if i != j]
    sample_ids, first, second = torch.tensor(pairs).T.contiguous().to(DEVICE)
    values = torch.tensor([1.0, 0.5, 0.0], device=DEVICE)
    size = shapes(896, 136)
    hidden, rows = draw(len(pairs), size), draw(3, size, scale=0.1)
    own: dict[str, Any] = {"verdict_values": values, "sample_ids": sample_ids}
    poison()
    found = pairwise_verdict(hidden, rows, first, second, candidates, **own)
    with use_backend("torch"):
        expected = pairwise_verdict(hidden.double(), rows.double(), first, second, candidates, **own)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-5)  # products summed in fp32


@pytest.mark.parametrize(("rows", "size"), shapes([(5, 37), (1027, 4096), (64, 8192)], [(5, 37), (35, 264), (7, 1032)]))
@pytest.mark.parametrize("trained", [False, True])
def test_rms_norm(rows: int, size: int, trained: bool, dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, dtype)
    parts = [draw(rows, size, grad=True), draw(size, grad=trained)]
    no_worse_than_twice(rms_norm, lambda x, weight: F.rms_norm(x, (size,), weight, 1e-6), parts, seed)


def test_rope(dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, dtype)
    rows, heads = shapes((301, 9), (21, 3))
    angles = torch.rand(rows, 32, generator=draw.generator).repeat(1, 2).mul(6).to(DEVICE)

    def theirs(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = (part[:, None].to(x.dtype) for part in (angles.cos(), angles.sin()))
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def ours(x: Tensor) -> Tensor:
        return rope(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))

    no_worse_than_twice(ours, theirs, [draw(rows, heads, 64, grad=True)], seed)


def test_swiglu(dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, dtype)
    size = shapes((129, 1377), (9, 377))
    parts = [draw(*size, grad=True), draw(*size, grad=True)]
    no_worse_than_twice(swiglu, lambda gate, up: F.silu(gate) * up, parts, seed)


def test_lora_linears(dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, dtype)
    rows, size, outs = shapes((300, 256, (256, 128)), (35, 136, (136, 72)))
    parts = [draw(rows, size, grad=True)]
    for out in outs:
        adapter = [draw(8, size, scale=size**-0.5, grad=True), draw(out, 8, scale=0.1, grad=True)]
        parts += [draw(out, size, scale=size**-0.5), *adapter]

    def ours(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return lora_linears(x, [Adapted(rest[at], None, rest[at + 1], rest[at + 2], 2.0) for at in (0, 3)])

    def theirs(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return tuple(lora_linear_reference(x, rest[at], None, rest[at + 1], rest[at + 2], 2.0) for at in (0, 3))

    no_worse_than_twice(ours, theirs, parts, seed)


def test_norm_gate_up_and_down_with_adapters(dtype: torch.dtype, seed: int) -> None:
    """Against PyTorch's operations, which keep normalised inputs and the gated activation."""
    draw = Draw(seed, dtype)
    rows, size, inner = shapes((300, 256, 704), (35, 136, 264))
    parts = [draw(rows, size, grad=True), draw(size)]
    for out, into in ((inner, size), (inner, size), (size, inner)):
        adapter = [draw(8, into, scale=into**-0.5, grad=True), draw(out, 8, scale=0.1, grad=True)]
        parts += [draw(out, into, scale=into**-0.5), *adapter]

    def adapted(parts: tuple[Tensor, ...]) -> list[Adapted]:
        return [Adapted(parts[at], None, parts[at + 1], parts[at + 2], 2.0) for at in (0, 3, 6)]

    def ours(x: Tensor, norm: Tensor, *rest: Tensor) -> Tensor:
        gate, up, down = adapted(rest)
        return swiglu_lora_linear(*lora_linears(x, [gate, up], Norm(norm, 1e-6)), down)

    def theirs(x: Tensor, norm: Tensor, *rest: Tensor) -> Tensor:
        def linear(x: Tensor, one: Adapted) -> Tensor:
            return lora_linear_reference(x, one.weight, None, one.lora_a, one.lora_b, one.scaling)

        x = F.rms_norm(x, (size,), norm, 1e-6)
        gate, up, down = adapted(rest)
        return linear(F.silu(linear(x, gate)) * linear(x, up), down)

    no_worse_than_twice(ours, theirs, parts, seed)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("shape", "blocksize"),
    shapes(
        [((4096, 1024), 64), ((67, 33), 32), ((129, 4096), 4096)], [((136, 72), 64), ((67, 33), 32), ((3, 4097), 4096)]
    ),
)
def test_nf4_bit_for_bit(shape: Any, blocksize: int, double_quant: bool, dtype: torch.dtype, seed: int) -> None:
    weight = Draw(seed, dtype)(*shape)
    poison()
    ours = nf4_quantize(weight, blocksize=blocksize, double_quant=double_quant)
    values = nf4_dequantize(ours)
    with use_backend("reference"):
        theirs = nf4_quantize(weight, blocksize=blocksize, double_quant=double_quant)
        assert torch.equal(values, nf4_dequantize(ours)), f"seed {seed}"
    assert torch.equal(ours.packed, theirs.packed) and torch.equal(ours.absmax, theirs.absmax), f"seed {seed}"


def test_nf4_is_what_bitsandbytes_computes_on_this_gpu(dtype: torch.dtype, seed: int) -> None:
    if (reason := why_not_fused()) is not None:  # it can be imported where its CUDA library is not loaded
        pytest.skip(f"bitsandbytes: {reason}")
    functional = importlib.import_module("bitsandbytes.functional")
    weight = Draw(seed, dtype)(512, 1024)
    packed, state = functional.quantize_4bit(weight, compress_statistics=False, quant_type="nf4")
    ours = nf4_quantize(weight, double_quant=False)
    assert torch.equal(ours.packed, packed.view(-1)) and torch.equal(ours.absmax, state.absmax), f"seed {seed}"
    assert torch.equal(nf4_dequantize(ours), functional.dequantize_4bit(packed, state)), f"seed {seed}"


@pytest.mark.parametrize("rows", shapes([1, 16, 64, 65, 700], [1, 16, 65]))
def test_nf4_linear(rows: int, dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, dtype)
    size = shapes((384, 512), (96, 192))
    weight = nf4_quantize(draw(*size, scale=0.05))
    whole = nf4_dequantize(weight)
    no_worse_than_twice(
        lambda x: nf4_linear(x, weight), lambda x: x @ whole.to(x.dtype).T, [draw(rows, size[1], grad=True)], seed
    )
