"""What a training step keeps of a decoder with adapters: no more than the gradients of adapters and inputs need."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srcfast.config.settings import LoRAConfig
from srcfast.models.decoder import Decoder, DecoderConfig
from srcfast.models.lora import TARGETS, add_lora
from srcfast.models.quantized import NF4Linear, quantize_linears
from srcfast_kernels import linear_logprob

HIDDEN, KEYS, INTERMEDIATE, HEAD, LAYERS, RANK = 64, 32, 160, 16, 2, 8


def model(dtype: torch.dtype, four_bits: bool) -> nn.Module:
    """Two layers with all seven targets adapted; everything else is frozen."""
    config = DecoderConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_layers=LAYERS,
        num_heads=HIDDEN // HEAD,
        num_kv_heads=KEYS // HEAD,
        head_dim=HEAD,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
    )
    whole = nn.Module()
    whole.decoder = Decoder(config)
    if four_bits:
        quantize_linears(whole.decoder)
        for part in whole.decoder.modules():
            if isinstance(part, NF4Linear):
                part.set_weight(torch.randn(part.out_features, part.in_features).to(dtype))
    whole.to(dtype).requires_grad_(False)
    add_lora(whole, LoRAConfig(r=RANK, target_modules=TARGETS, alpha=32.0))
    return whole.train()


def activation_bytes(run: Callable[[], object], parameters: list[Tensor]) -> int:
    """Bytes of the storages that are saved within, each once, without the parameters' own."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for place, tensor in found.items() if place not in owned)


class Attended(torch.autograd.Function):
    """Stands for FlashAttention: it keeps q, k, v and its output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = q.clone()
        ctx.save_for_backward(q, k, v, output)
        return output


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_token_keeps_what_gradients_need_and_no_more(dtype: torch.dtype, four_bits: bool) -> None:
    whole = model(dtype, four_bits)
    kept = []
    for tokens in (32, 96):  # the difference is free of what doesn't depend on tokens
        embeddings, positions = torch.randn(tokens, HIDDEN, dtype=dtype), torch.arange(tokens)
        run = partial(whole.decoder, embeddings, positions, lambda layer, q, k, v: Attended.apply(q, k, v))
        kept.append(activation_bytes(run, list(whole.parameters())))
    queries = HIDDEN
    layer = (
        2 * HIDDEN  # the inputs of the two norms: q, k, v, gate and up need nothing else
        + 2 * queries + 2 * KEYS  # attention's, of which o shares the output; RoPE and the projections add nothing
        + 2 * INTERMEDIATE  # gate and up, not their product
        + len(TARGETS) * RANK
    )  # fmt: skip
    norms = (2 * LAYERS + 1) * 4  # a number in fp32 a row
    expected = (LAYERS * layer + 2 * HEAD + HIDDEN) * dtype.itemsize + norms  # cos and sin; the last norm's input
    assert (kept[1] - kept[0]) / 64 == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_frozen_head_keeps_the_unit_gradients_alone(dtype: torch.dtype) -> None:
    hidden = torch.randn(40, HIDDEN, dtype=dtype, requires_grad=True)
    weight, targets = torch.randn(50, HIDDEN, dtype=dtype), torch.randint(50, (40,))
    kept = activation_bytes(lambda: linear_logprob(hidden, weight, targets).sum(), [weight, targets])
    assert kept == 40 * HIDDEN * dtype.itemsize
