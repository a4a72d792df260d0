"""The decoder's small operations against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from srcfast_kernels import lora_linear, nf4_dequantize, nf4_quantize, rms_norm, rope, swiglu
from srcfast_kernels.backends import BACKENDS, Backend, use_backend
from srcfast_kernels.lora_linear import Adapted, Norm, lora_linear_reference, lora_linears, swiglu_lora_linear
from srcfast_kernels.rms_norm import rms_norm_reference
from srcfast_kernels.rope import rope_reference
from srcfast_kernels.swiglu import swiglu_reference

SHAPES: dict[str, tuple[Any, Any, list[tuple[int, ...]]]] = {
    "rms_norm": (rms_norm, rms_norm_reference, [(5, 3, 7), (7,)]),
    "swiglu": (swiglu, swiglu_reference, [(5, 11), (5, 11)]),
    "lora_linear": (
        lambda x, w, b, down, up: lora_linear(x, w, b, down, up, 1.7),
        lambda x, w, b, down, up: lora_linear_reference(x, w, b, down, up, 1.7),
        [(5, 7), (3, 7), (3,), (2, 7), (3, 2)],
    ),
    "lora_linear without bias": (
        lambda x, w, down, up: lora_linear(x, w, None, down, up, 0.3),
        lambda x, w, down, up: lora_linear_reference(x, w, None, down, up, 0.3),
        [(1, 7), (3, 7), (1, 7), (3, 1)],
    ),
}


def tensors(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", SHAPES)
def test_values_equal_the_definition_and_gradients_finite_differences(name: str) -> None:
    function, reference, shapes = SHAPES[name]
    inputs = tensors(shapes, len(name))
    torch.testing.assert_close(function(*inputs), reference(*inputs), rtol=1e-12, atol=1e-12)  # fp64
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", SHAPES)
def test_no_rows_are_no_rows(name: str) -> None:
    function, _, shapes = SHAPES[name]
    inputs = tensors(shapes)
    rows = 2 if name == "swiglu" else 1
    out = function(*[x[:0] for x in inputs[:rows]], *inputs[rows:])
    assert out.shape[0] == 0
    out.sum().backward()


def angles(rows: int, size: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    values = torch.rand(rows, size // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 99
    values = torch.cat((values, values), dim=-1)
    return values.cos(), values.sin()


def test_rope_is_a_rotation() -> None:
    (x,) = tensors([(5, 3, 8)])
    cos, sin = angles(5, 8)
    turned = rope(x, cos, sin)
    torch.testing.assert_close(turned, rope_reference(x, cos, sin), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rope(turned, cos, -sin), x)
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), (x,))


def test_rope_makes_scores_depend_on_distance_alone() -> None:
    (x,) = tensors([(2, 1, 6)])
    frequencies = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)
    scores = []
    for shift in (0, 17):
        turns = (torch.tensor([3.0 + shift, 8.0 + shift], dtype=torch.float64)[:, None] * frequencies).repeat(1, 2)
        q, k = rope(x, turns.cos(), turns.sin())[:, 0]
        scores.append(q @ k)
    torch.testing.assert_close(scores[0], scores[1])


def test_each_frequency_turns_by_its_own_section_s_axis() -> None:
    """Qwen2-VL's multimodal RoPE: of six frequencies one turns by time, two by height, three by width."""
    (x,) = tensors([(5, 3, 12)])
    sets = [angles(5, 12, seed) for seed in range(3)]
    turned = rope(x, *(torch.stack([one[i] for one in sets]) for i in (0, 1)), (1, 2, 3))
    for frequency, axis in enumerate([0, 1, 1, 2, 2, 2]):
        cos, sin = (part[:, None, frequency] for part in sets[axis])  # [T, 1]
        first, second = x[..., frequency], x[..., frequency + 6]
        torch.testing.assert_close(turned[..., frequency], first * cos - second * sin, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(turned[..., frequency + 6], second * cos + first * sin, rtol=1e-12, atol=1e-12)


def test_equal_axes_are_ordinary_rope() -> None:
    (x,) = tensors([(4, 2, 8)])
    cos, sin = angles(4, 8)
    both = rope(x, cos.expand(3, -1, -1), sin.expand(3, -1, -1), (1, 1, 2)), rope(x, cos, sin)
    assert torch.equal(both[0], both[1])


def test_swiglu_keeps_its_inputs() -> None:
    gate, up = tensors([(3, 4), (3, 4)])
    before = gate.detach().clone(), up.detach().clone()
    swiglu(gate, up).sum().backward()
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_with_a_frozen_weight_gives_the_gradient_of_its_definition(dtype: torch.dtype) -> None:
    values, weight = (x.detach().to(dtype) for x in tensors([(6, 2, 33), (33,)]))
    gradients = []
    for function, wide in ((rms_norm, dtype), (rms_norm_reference, torch.float64)):
        x = values.to(wide, copy=True).requires_grad_()
        function(x, weight.to(wide), 1e-5).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad.double())
    # fp32 rounds at 2^-24, bf16 at 2^-9, a few times each, over sums of 33 terms
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance * float(gradients[1].abs().max()))


def test_rms_norm_of_zeros_is_zero_and_has_a_finite_gradient() -> None:
    x = torch.zeros(3, 5, requires_grad=True)
    out = rms_norm(x, torch.ones(5))
    out.sum().backward()
    assert not out.any() and x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_mixed_precision_under_autocast_gives_gradients_of_the_inputs_dtypes() -> None:
    x, weight, down, up = (
        part.detach().float().requires_grad_() for part in tensors([(5, 12), (12, 12), (2, 12), (12, 2)])
    )
    cos, sin = (angle.float() for angle in angles(5, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = lora_linear(rms_norm(x, torch.ones(12)), weight, None, down, up, 1.0)
        assert hidden.dtype == torch.bfloat16
        out = swiglu(rope(hidden.view(5, 3, 4), cos, sin), hidden.view(5, 3, 4))
    out.float().sum().backward()
    for part in (x, weight, down, up):
        assert part.grad is not None and part.grad.dtype == torch.float32 and bool(part.grad.any())


def test_frozen_layers_under_autocast_give_gradients_of_the_inputs_dtypes() -> None:
    generator = torch.Generator().manual_seed(4)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x = draw(9, 16).requires_grad_()
    gate, up, down = (random_adapted(draw, *size, 2, False, True) for size in ((24, 16), (24, 16), (16, 24)))
    leaves = [x, *(part for one in (gate, up, down) for part in (one.lora_a, one.lora_b))]
    outer = draw(9, 16)
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = swiglu_lora_linear(*lora_linears(x, [gate, up], Norm(torch.ones(16), 1e-6)), down)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        results.append(torch.autograd.grad(out, leaves, outer.to(out.dtype)))
    for cast, exact in zip(*results, strict=True):
        assert cast.dtype == torch.float32
        # bf16 rounds at 2^-9, a dozen times over
        torch.testing.assert_close(cast, exact, rtol=0, atol=0.05 * float(exact.abs().max()))


def test_an_adapter_of_another_type_than_its_input_s_is_taken_in_the_input_s() -> None:
    x, weight, _, down, up = (part.detach() for part in tensors([(5, 7), (3, 7), (3,), (2, 7), (3, 2)]))
    down, up = (part.float().requires_grad_() for part in (down, up))
    out = lora_linear(x.bfloat16(), weight.bfloat16(), None, down, up, 0.5)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(part.grad is not None and part.grad.dtype == torch.float32 for part in (down, up))


@pytest.mark.parametrize("angles_of", [1, 3])
def test_rope_refuses_sections_without_their_angles_and_the_other_way_round(angles_of: int) -> None:
    x, turn = torch.randn(2, 1, 4), torch.ones(3, 2, 4)
    given, sections = (turn, None) if angles_of == 3 else (turn[0], (1, 1, 0))
    with pytest.raises(ValueError, match="mrope_sections"):
        rope(x, given, given, sections)


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight, bias, down, up = tensors([(5, 7), (3, 7), (3,), (2, 7), (3, 2)])
    weight.requires_grad_(False), bias.requires_grad_(False)
    lora_linear(x, weight, bias, down, up, 1.0).sum().backward()
    assert weight.grad is None and bias.grad is None
    assert all(part.grad is not None for part in (x, down, up))


@pytest.mark.parametrize("name", SHAPES)
def test_bf16_is_close_to_fp64(name: str) -> None:
    function, reference, shapes = SHAPES[name]
    inputs = [x.detach().bfloat16() for x in tensors(shapes)]
    exact = reference(*[x.double() for x in inputs])
    out = function(*inputs)
    assert out.dtype == torch.bfloat16
    # bf16 has 8 bits: a rounding is 2^-9 relative; a handful of them over sums of 7 terms.
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("needs_x", [True, False])
def test_linears_of_one_input_go_together(four_bits: bool, needs_x: bool) -> None:
    shapes = [(6, 2), (3, 2), (5, 4)]  # outputs and rank of each
    results = []
    for together in (True, False):
        generator = torch.Generator().manual_seed(3)

        def drawn(*size: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        x = drawn(7, 11).requires_grad_(needs_x)
        linears = []
        for number, (out, rank) in enumerate(shapes):
            weight: Any = drawn(out, 11)
            if four_bits and number == 1:
                weight = nf4_quantize(weight.float())
            parts = [drawn(rank, 11).requires_grad_(), drawn(out, rank).requires_grad_()]
            linears.append(Adapted(weight, None if number == 2 else drawn(out), *parts, 0.5 + number))
        if together:
            outputs = lora_linears(x, linears)
        else:
            whole = [
                one.weight if isinstance(one.weight, Tensor) else nf4_dequantize(one.weight).double() for one in linears
            ]
            outputs = tuple(
                lora_linear_reference(x, weight, one.bias, one.lora_a, one.lora_b, one.scaling)
                for weight, one in zip(whole, linears, strict=True)
            )
        sum((output * drawn(*output.shape)).sum() for output in outputs).backward()
        leaves = [x] if needs_x else []
        leaves += [part for one in linears for part in (one.lora_a, one.lora_b)]
        results.append([*outputs, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # fp64


def test_an_output_that_is_not_used_changes_no_gradient() -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    parts = [torch.randn(2, 5), torch.randn(3, 2), torch.randn(2, 5), torch.randn(3, 2)]
    a1, b1, a2, b2 = (part.double().requires_grad_() for part in parts)
    weight = torch.randn(3, 5, dtype=torch.float64)
    used, _ = lora_linears(x, [Adapted(weight, None, a1, b1, 1.0), Adapted(weight, None, a2, b2, 1.0)])
    used.sum().backward()
    assert a1.grad is not None and a1.grad.any() and a2.grad is not None and not a2.grad.any()


def random_adapted(draw: Any, out: int, into: int, rank: int, four_bits: bool, bias: bool) -> Adapted:
    weight = draw(out, into)
    whole: Any = nf4_quantize(weight.float()) if four_bits else weight
    adapter = [draw(rank, into).requires_grad_(), draw(out, rank).requires_grad_()]
    return Adapted(whole, draw(out) if bias else None, *adapter, 0.5 + rank)


def plainly(x: Tensor, one: Adapted) -> Tensor:
    weight = one.weight if isinstance(one.weight, Tensor) else nf4_dequantize(one.weight).double()
    return lora_linear_reference(x, weight, one.bias, one.lora_a, one.lora_b, one.scaling)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_a_gated_layer_gives_what_its_operations_give_one_by_one(
    rows: int, needs_x: bool, bias: bool, four_bits: bool, backend: Backend
) -> None:
    generator = torch.Generator().manual_seed(rows + 10 * needs_x + 20 * four_bits)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, norm, eps = draw(rows, 11).requires_grad_(needs_x), draw(11), 1e-3
    gate, up = (random_adapted(draw, 13, 11, rank, four_bits, bias) for rank in (2, 3))
    down = random_adapted(draw, 11, 13, 4, four_bits, bias)
    leaves = [part for one in (gate, up, down) for part in (one.lora_a, one.lora_b)] + [x] * needs_x
    outer = draw(rows, 11)
    with use_backend(backend):
        ours = swiglu_lora_linear(*lora_linears(x, [gate, up], Norm(norm, eps)), down)
        gradients = torch.autograd.grad(ours, leaves, outer)
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm
    product = plainly(normed, gate) * torch.sigmoid(plainly(normed, gate)) * plainly(normed, up)
    theirs = plainly(product, down)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)  # fp64, values of about 1000
    for own, other in zip(gradients, torch.autograd.grad(theirs, leaves, outer), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-8)  # of up to a million terms' rounding


def test_of_a_gated_layer_neither_the_normed_input_nor_the_product_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x = draw(64, 32).requires_grad_()
    gate, up, down = (random_adapted(draw, *size, 2, False, False) for size in ((96, 32), (96, 32), (32, 96)))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel() if len(tensor) == 64 else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = swiglu_lora_linear(*lora_linears(x, [gate, up], Norm(torch.ones(32), 1e-6)), down)
    # x and a number a row for the norm, gate and up, and three low-rank activations
    assert sum(kept.values()) == 64 * (32 + 1 + 96 + 96 + 2 + 2 + 2)
    out.sum().backward()


def test_a_backward_through_a_kept_graph_gives_the_same_twice() -> None:
    """Buffers of the backward pass are written over, saved tensors are not."""
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    gate, up = draw(5, 7).requires_grad_(), draw(5, 7).requires_grad_()
    down = random_adapted(draw, 3, 7, 2, False, True)
    for backend in BACKENDS:
        with use_backend(backend):
            out = swiglu_lora_linear(gate, up, down)
            outer = draw(5, 3)
            once, again = (
                torch.autograd.grad(out, (gate, up, down.lora_a, down.lora_b), outer, retain_graph=True)
                for _ in range(2)
            )
        assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
