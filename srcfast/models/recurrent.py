"""Recurrent mixers of transformers' models (gated DeltaNet, short convolutions) on a forest and in decoding.

Such a layer continues a state from token to token. On a forest each segment begins with the state in which its parent ended, so
that no token runs twice; a row of a decoding step continues the state of that row. transformers' mixers ask a cache for their
states: here it is a `States`, which is differentiable, and which nothing writes in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srcfast.data.forest import Forest

MIXERS = ("GatedDeltaNet", "ShortConv")  # how names of their classes end
CACHES = ("cache", "cache_params", "past_key_values")  # names of their argument, by transformers' version
LAYERS = ("linear_attention", "conv")  # their names in a config's layer_types

Run = Callable[..., Tensor]  # (hidden [B, n, D], cache=States) -> [B, n, D]
Mix = Callable[[int, Run, Tensor], Tensor]  # (layer, run, hidden [1, T, D]) -> [1, T, D]


class States:
    """The states of one layer for B sequences, with the methods of transformers' cache that a mixer calls.

    Attributes:
        conv: [B, channels, kernel - 1], the last inputs of the convolution; None before the first token.
        recurrent: [B, ...]; None before the first token, and in layers that have none.
    """

    def __init__(self, conv: Tensor | None = None, recurrent: Tensor | None = None) -> None:
        self.conv, self.recurrent = conv, recurrent

    @property
    def layers(self) -> _EveryLayer:
        """Return what transformers before 5.18 reads as `layers[number]`."""
        return _EveryLayer(self)

    def get_conv_state(self, layer: int, state_idx: int = 0) -> Tensor | None:
        return self.conv

    def get_recurrent_state(self, layer: int, state_idx: int = 0) -> Tensor | None:
        return self.recurrent

    def has_previous_state(self, layer: int | None = None, state_idx: int | None = None) -> bool:
        return self.conv is not None

    def is_recording_past(self, layer: int) -> bool:
        """Return True: a mixer then doesn't take the step that writes its state in place."""
        return True

    def update_conv_state(self, x: Tensor, layer: int, conv_kernel_size: int = 1, **options: Any) -> Tensor:
        """Return the stored inputs and `x` [B, channels, n], and store the last ones."""
        whole = x if self.conv is None else torch.cat((self.conv, x), dim=-1)
        length = conv_kernel_size - 1
        self.conv = F.pad(whole, (max(0, length - whole.shape[-1]), 0))[..., -length:] if length else None
        return whole

    def update_recurrent_state(self, state: Tensor, layer: int, **options: Any) -> Tensor:
        self.recurrent = state
        return state


class _EveryLayer:
    """The layers of a cache, whose states are those of one `States` by any number."""

    record_past = True  # see `States.is_recording_past`

    def __init__(self, states: States) -> None:
        self.states = states

    def __getitem__(self, layer: int) -> _EveryLayer:
        return self

    @property
    def conv_states(self) -> list[Tensor | None]:
        return [self.states.conv]

    @property
    def recurrent_states(self) -> list[Tensor | None]:
        return [self.states.recurrent]


def forest_mix(forest: Forest, on_root: Callable[[int, int, States], None] | None = None) -> Mix:
    """Return the mixing of a forest's tokens.

    Args:
        on_root: called with layer, number of the tree, and the states in which the tree's root ended.
    """

    def mix(layer: int, run: Run, hidden: Tensor) -> Tensor:
        outputs = []
        for number, (tree, starts) in enumerate(zip(forest.trees, forest.segment_start, strict=True)):
            ended: list[States] = []
            for segment, start in zip(tree.segments, starts, strict=True):
                parent = States() if segment.parent < 0 else ended[segment.parent]
                states = States(parent.conv, parent.recurrent)
                outputs.append(run(hidden[:, start : start + segment.tokens.size], cache=states))
                ended.append(states)
            if on_root is not None:
                on_root(layer, number, ended[0])
        return torch.cat(outputs, dim=1)

    return mix


def value_width(text_config: Any) -> int:
    """Return the width of the values of a text config's gated DeltaNet layers, over all heads; 0 without such layers."""
    if "linear_attention" not in (getattr(text_config, "layer_types", None) or ()):
        return 0
    return int(text_config.linear_num_value_heads * text_config.linear_value_head_dim)


def state_sizes(config: Any) -> tuple[int, int]:
    """Count the numbers of a sequence's states over all recurrent layers of a config: of convolutions, and recurrent ones."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ()
    convolution = recurrent = 0
    if deltas := list(kinds).count("linear_attention"):
        keys = text.linear_num_key_heads * text.linear_key_head_dim
        values = value_width(text)
        convolution += deltas * (2 * keys + values) * (text.linear_conv_kernel_dim - 1)
        recurrent += deltas * values * text.linear_key_head_dim
    if short := list(kinds).count("conv"):
        convolution += short * text.hidden_size * (text.conv_L_cache - 1)
    return convolution, recurrent


def mixers(layers: nn.Module) -> list[nn.Module]:
    """List the recurrent mixers of a layer, or of a model's layers."""
    return [module for module in layers.modules() if type(module).__name__.endswith(MIXERS)]


def mix_by_caller(layer: Any) -> None:
    """Let a layer's mixer hand its input to the `mix` of the pass, in place of running it as one sequence.

    The layer takes `mix` and stores it while it runs: not every mixer is handed the layer's keyword arguments.
    """
    (mixer,) = mixers(layer)
    run_layer, ordinary = layer.forward, mixer.forward
    name = next(name for name in CACHES if name in inspect.signature(ordinary).parameters)
    of_pass: list[Mix | None] = [None]

    def run(hidden_states: Tensor, cache: States, **options: Any) -> Tensor:
        return ordinary(hidden_states, **{name: cache}, **options)

    def forward(hidden_states: Tensor, attend: Any = None, **options: Any) -> Tensor:
        (mix,) = of_pass
        if mix is None:
            return ordinary(hidden_states, **options)
        return mix(mixer.layer_idx, partial(run, attention_mask=options.get("attention_mask")), hidden_states)

    def forward_layer(*arguments: Any, mix: Mix | None = None, **options: Any) -> Tensor:
        of_pass[0] = mix
        return run_layer(*arguments, **options)

    mixer.forward, layer.forward = forward, forward_layer
