"""States of recurrent layers, counted by literal numbers and continued token by token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from srcfast.models.recurrent import States, state_sizes, value_width


def config(*kinds: str) -> Any:
    text = SimpleNamespace(
        layer_types=kinds,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_num_value_heads=4,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=4,
        hidden_size=32,
        conv_L_cache=3,
    )
    text.get_text_config = lambda: text
    return text


@pytest.mark.parametrize(
    ("kinds", "convolution", "recurrent", "width"),
    [
        (("full_attention",), 0, 0, 0),
        # Queries and keys of 16 each and values of 64, of the last 3 tokens; 4 heads of 16 by 8.
        (("linear_attention",), (16 + 16 + 64) * 3, 4 * 16 * 8, 64),
        (("linear_attention", "full_attention", "linear_attention"), 2 * 96 * 3, 2 * 512, 64),
        (("conv", "full_attention"), 32 * 2, 0, 0),
    ],
)
def test_states_are_counted_by_their_numbers(
    kinds: tuple[str, ...], convolution: int, recurrent: int, width: int
) -> None:
    assert state_sizes(config(*kinds)) == (convolution, recurrent)
    assert value_width(config(*kinds)) == width


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_a_convolution_s_state_is_its_last_inputs_however_they_came(kernel: int) -> None:
    x = torch.arange(1.0, 13.0).view(1, 2, 6)
    for cuts in ([6], [1, 5], [2, 1, 3], [1] * 6):
        states, start = States(), 0
        assert not states.has_previous_state()
        for size in cuts:
            part = x[..., start : start + size]
            whole = states.update_conv_state(part, 0, kernel)
            assert torch.equal(whole[..., -size:], part)
            start += size
            if kernel > 1:  # zeros stand for what was before the first token
                before = torch.cat((torch.zeros(1, 2, kernel), x[..., :start]), dim=-1)
                assert states.conv is not None and torch.equal(states.conv, before[..., -(kernel - 1) :])
        assert (states.conv is None) == (kernel == 1)
    first = States()
    first.update_conv_state(x[..., :1], 0, 4)
    assert first.conv is not None and first.conv.tolist() == [[[0.0, 0.0, 1.0], [0.0, 0.0, 7.0]]]
