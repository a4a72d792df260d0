"""A few rows times a 4-bit weight on a GPU: fused where bitsandbytes has a kernel for the shape, else our own dequantisation.

On the simulated device, which reports an H100. What bitsandbytes and srcfast would launch is recorded, not run.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from srcfast_kernels import NF4Weight
from srcfast_kernels.backends import use_backend

pytestmark = pytest.mark.simulated
ours: Any = importlib.import_module("srcfast_kernels.nf4_linear")  # the package has a function of that name, too

SHAPES = [
    (4096, 4096),
    (11008, 4096),
    (4096, 11008),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (32064, 4096),
    (896, 896),
]
ROWS = [1, 4, 5, 6, 7, 8, 16, 24, 32, 33, 48, 64]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of what was launched: `fused` and `two passes` of bitsandbytes, `one pass` of srcfast."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import cextension
    from bitsandbytes.backends.cuda import ops

    names: list[str] = []

    def fused(x: Tensor, packed: Tensor, shape: list[int], *rest: Any, **options: Any) -> Tensor:
        names.append("fused")
        return x.new_empty(*x.shape[:-1], shape[0])

    def two_passes(x: Tensor, packed: Tensor, shape: list[int], *rest: Any, **options: Any) -> Tensor:
        names.append("two passes")
        return x.new_empty(*x.shape[:-1], shape[0])

    def one_pass(weight: NF4Weight) -> Tensor:
        names.append("one pass")
        return torch.empty(weight.shape, dtype=weight.dtype, device=weight.packed.device)

    monkeypatch.setattr(ops, "_gemm_4bit_kernel_impl", fused)
    monkeypatch.setattr(ops, "_dequant_linear_fallback", two_passes)
    monkeypatch.setattr(type(cextension.lib), "compiled_with_cuda", True)
    monkeypatch.setattr(ours, "nf4_dequantize", one_pass)
    for cached in (ours.why_not_fused, ours._dispatch_rule):
        cached.cache_clear()
    yield names
    for cached in (ours.why_not_fused, ours._dispatch_rule):
        cached.cache_clear()


def empty_weight(out_size: int, in_size: int, dtype: torch.dtype) -> NF4Weight:
    """In blocks of 64, with double quantisation."""
    blocks = -(-out_size * in_size // 64)
    return NF4Weight(
        packed=torch.empty(out_size * in_size // 2, dtype=torch.uint8, device="cuda"),
        absmax=torch.empty(blocks, dtype=torch.uint8, device="cuda"),
        nested_absmax=torch.empty(-(-blocks // 256), device="cuda"),
        offset=torch.empty((), device="cuda"),
        shape=torch.Size((out_size, in_size)),
        dtype=dtype,
        blocksize=64,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("out_size", "in_size"), SHAPES)
def test_bitsandbytes_never_dequantises_and_fuses_all_that_it_can(
    out_size: int, in_size: int, dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The recorded weight is never multiplied by: only what is launched counts.
    monkeypatch.setattr(ours, "linear", lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))
    weight = empty_weight(out_size, in_size, dtype)
    for rows in ROWS:
        x = torch.empty(rows, in_size, dtype=dtype, device="cuda")
        ours._few_rows(x, weight, None)  # what bitsandbytes would do itself
        assert ours.frozen_linear(x, weight, None).shape == (rows, out_size)
        itself, chosen = launched[-2:]
        assert chosen == {"fused": "fused", "two passes": "one pass"}[itself], f"{rows} rows"


def test_on_an_h100_a_beam_of_24_rows_takes_our_dequantisation_for_square_7b_weights(launched: list[str]) -> None:
    weight = empty_weight(4096, 4096, torch.bfloat16)
    for rows in (4, 24):
        ours.frozen_linear(torch.empty(rows, 4096, dtype=torch.bfloat16, device="cuda"), weight, None)
    assert launched == ["fused", "one pass"]


def test_what_bitsandbytes_refuses_or_warns_of_is_never_handed_to_it(launched: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.frozen_linear(torch.zeros(2, 4, 96, device="cuda"), empty_weight(64, 96, torch.float32), None)
        fp64 = torch.zeros(2, 128, dtype=torch.float64, device="cuda")
        ours.frozen_linear(fp64, empty_weight(64, 128, torch.float64), None)
        with use_backend("torch"):  # forced by a setting
            ours.frozen_linear(torch.zeros(2, 128, device="cuda"), empty_weight(64, 128, torch.float32), None)
    assert launched == ["one pass"] * 3


@pytest.mark.parametrize("other", [None, lambda dtype, M, N, K: True])
def test_of_a_bitsandbytes_without_the_rule_only_few_enough_rows_are_fused(
    other: Any, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.backends.cuda import ops

    weight = empty_weight(4096, 4096, torch.bfloat16)
    monkeypatch.setattr(ops, ours.RULE, other)
    with monkeypatch.context() as patch:
        patch.setattr(ours, "_few_rows", lambda x, weight, bias: launched.append("fused"))
        for rows in (4, 5):
            ours.frozen_linear(torch.empty(rows, 4096, dtype=torch.bfloat16, device="cuda"), weight, None)
    assert launched == ["fused", "one pass"]
