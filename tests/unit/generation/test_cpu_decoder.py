"""The CPU's decoder and the model's own are one function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srcfast.config.settings import LoRAConfig
from srcfast.generation.cpu_decoder import FEW_ROWS, CPUDecoder
from srcfast.models.decoder import Decoder, DecoderConfig
from srcfast.models.lora import add_lora, folded_lora

SHAPES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"qk_norm": True},
    "all biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
}


def made(dtype: torch.dtype = torch.float32, **changes: bool) -> Decoder:
    config = DecoderConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        **changes,
    )
    torch.manual_seed(3)
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder.to(dtype).requires_grad_(False)


def averaging(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands for attention: depends on all of q, k and v, differently in each layer."""
    q, k, v = (x.reshape(len(q), -1, 8) for x in (q, k, v))
    return (q + (layer + 1) * k.repeat_interleave(2, dim=1)) * v.repeat_interleave(2, dim=1).tanh()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, FEW_ROWS - 1, FEW_ROWS, 70])
def test_it_gives_what_the_decoder_gives(shape: str, rows: int) -> None:
    decoder = made(**SHAPES[shape])
    fast = CPUDecoder.of(decoder)
    assert fast is not None
    embeddings, positions = torch.randn(rows, 32), torch.randint(0, 90, (rows,))
    with torch.inference_mode():
        expected = decoder(embeddings, positions, averaging)
        found = fast(embeddings, positions, averaging)
        # fp32: sums of some dozen products in another order, through two layers
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        logits = expected @ decoder.head_weight.T
        torch.testing.assert_close(fast.logits(expected), logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_takes_part_where_it_is_folded_in() -> None:
    holder = torch.nn.Module()
    holder.decoder = made()
    add_lora(holder, LoRAConfig(r=4, alpha=8))
    for name, parameter in holder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    embeddings, positions = torch.randn(9, 32), torch.arange(9)
    assert CPUDecoder.of(holder.decoder) is None
    with torch.inference_mode(), folded_lora(holder):
        fast = CPUDecoder.of(holder.decoder)
        assert fast is not None
        found = fast(embeddings, positions, averaging)
    torch.testing.assert_close(found, holder.decoder(embeddings, positions, averaging), rtol=1e-4, atol=1e-5)


def test_other_dtypes_keep_the_decoder() -> None:
    assert CPUDecoder.of(made(torch.float64)) is None and CPUDecoder.of(made(torch.bfloat16)) is None
