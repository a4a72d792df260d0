"""The decoding step: the pending token of each row -> decoder over the cache -> logits -> the next token, sampled on the device.

It doesn't depend on samples, on why rows end, or on the call that runs it: a captured step may serve many calls. What changes
from step to step reaches the device in one transfer, from page-locked memory that nothing writes again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcfast.attention.forest_attention import Attend
from srcfast.generation.cpu_decoder import CPUDecoder, Forward
from srcfast.generation.kv_cache import SlotCache
from srcfast.generation.row_states import RowStates
from srcfast.generation.sampling import Sampling, draw_tokens
from srcfast.models.protocols import HasDecoder
from srcfast.models.sharding import is_sharded

Drawn = tuple[Tensor, Tensor]  # tokens [R] int64, their log-probabilities [R]


class DecodingStep:
    """A callable `(numbers, count, used, longest) -> Drawn`, see `step_numbers`, that reads no tensor's values on the host.

    Args:
        cache: of keys and values; see its `begin` for `used` and `longest`.
        sampling: how tokens are sampled.
    """

    def __init__(self, model: HasDecoder, cache: SlotCache, sampling: Sampling) -> None:
        decoder = model.decoder
        fast = None if is_sharded(decoder) else CPUDecoder.of(decoder)
        self.forward: Forward = fast or decoder
        self.head: Callable[[Tensor], Tensor] = fast.logits if fast else lambda hidden: decoder.head.logits(hidden)
        # Of prompts. Around the general backbone's layers, code of transformers puts images in.
        self.prefill: Callable[[Any, Tensor, Attend], Tensor] = (
            partial(fast.run_within, decoder) if fast and not decoder.is_handwritten else self.forward
        )
        self.embed: Callable[[Tensor], Any] = fast.embed if fast else decoder.embed
        self.cache, self.sampling = cache, sampling
        # A placeholder in a response would stand for an image that is not there.
        self.excluded: int | None = getattr(model, "image_token_id", None)
        self.pending = torch.zeros(cache.layout.rows, dtype=torch.int64, device=cache.device)  # sampled, not yet run

    def __call__(self, numbers: Tensor, count: int, used: int, longest: int, states: RowStates | None = None) -> Drawn:
        rows, positions = numbers[:count], numbers[count : 2 * count]
        uniform, lengths = numbers[2 * count : 3 * count].view(torch.float64), numbers[3 * count :]
        attend = self.cache.begin(rows, lengths, used, longest)
        embedded = self.embed(self.pending[rows])
        if states is not None:
            embedded = states.continuing(embedded, rows)
        hidden = self.forward(embedded, positions, attend)
        tokens, logprobs = self.draw(self.head(hidden), uniform)
        self.pending[rows] = tokens
        return tokens, logprobs

    def draw(self, logits: Tensor, uniform: Tensor) -> Drawn:
        """Sample tokens [R] from logits [R, V] and one uniform number a row; never an image's placeholder."""
        return draw_tokens(logits, uniform, self.sampling, self.excluded)


def step_numbers(
    rows: np.ndarray, positions: np.ndarray, uniform: np.ndarray, lengths: np.ndarray, count: int, spare: int = 0
) -> np.ndarray:
    """Pack a step's input into one array, int64 [3 * count + all rows of the cache].

    Args:
        rows: [R], R <= count: indices of the step's rows, ascending.
        positions: [R] of their pending tokens.
        uniform: [R] float64 in [0, 1), stored bit by bit.
        lengths: of all rows of the cache, the positions of their continuations.
        count: length to which the first three are padded.
        spare: the row index that pads `rows`.
    """
    numbers = np.zeros(3 * count + len(lengths), dtype=np.int64)
    numbers[: len(rows)], numbers[len(rows) : count] = rows, spare
    numbers[count : count + len(positions)] = positions
    numbers[2 * count : 2 * count + len(uniform)] = uniform.view(np.int64)
    numbers[3 * count :] = lengths
    return numbers
