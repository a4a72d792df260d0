"""The head's logits are fp32 of whatever the hidden states are, soft-capped where the model does so."""

from __future__ import annotations

import math

import pytest
import torch

from srcfast.models.head import Head


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_products_in_fp32_one_by_one(dtype: torch.dtype, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 16, generator=generator).to(dtype)
    weight = torch.randn(11, 16, generator=generator).to(dtype)
    tokens = torch.tensor([7, 2, 9])
    head = Head(weight, softcap)
    every, some = head.logits(hidden), head.logits(hidden, tokens)
    assert every.dtype == some.dtype == torch.float32 and every.shape == (3, 11) and some.shape == (3, 3)
    for row in range(3):
        exact = [
            sum(a * b for a, b in zip(hidden[row].tolist(), weight[token].tolist(), strict=True)) for token in range(11)
        ]
        if softcap is not None:
            exact = [softcap * math.tanh(one / softcap) for one in exact]
        # fp32 sums of 16 products; products rounded to 16 bits would be off by a hundredth.
        assert every[row].tolist() == pytest.approx(exact, abs=1e-5)
        assert some[row].tolist() == pytest.approx([exact[token] for token in tokens], abs=1e-5)
        total = math.log(sum(math.exp(one) for one in exact))
        logps = head.logprobs(hidden[row].expand(3, -1), tokens)
        assert logps.tolist() == pytest.approx([exact[token] - total for token in tokens], abs=1e-5)
    assert head.options == {"softcap": softcap}
