"""The decoding step: the pending token of each row -> decoder over the cache -> logits -> the next token, drawn on the device.

It knows nothing of samples or of why rows end, and refers to nothing of the call that runs it: a captured step may serve many.
What changes from step to step reaches the device in one transfer, from page-locked memory that nothing writes again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from srcfast.generation.cpu_decoder import CPUDecoder, Forward
from srcfast.generation.kv_cache import SlotCache
from srcfast.generation.sampling import Sampling, draw_tokens
from srcfast.models.protocols import HasDecoder, TransformerDecoder
from srcfast.models.sharding import is_sharded
from srcfast_kernels import head_logits

Drawn = tuple[Tensor, Tensor]  # tokens [R] int64, their log-probabilities [R]


class DecodingStep:
    """Calls as `(numbers, rows, used, longest) -> Drawn`, see `step_numbers`; looks at no tensor's values.

    Args:
        cache: of keys and values; see its `begin` for `used` and `longest`.
        sampling: how tokens are drawn.
    """

    def __init__(self, model: HasDecoder, cache: SlotCache, sampling: Sampling) -> None:
        decoder = model.decoder
        fast = None if is_sharded(decoder) else CPUDecoder.of(decoder)
        self.forward: Forward = fast or decoder
        self.head: Callable[[Tensor], Tensor] = fast.logits if fast else partial(_next_logits, decoder)
        self.embed: Callable[[Tensor], Tensor] = decoder.embed
        self.cache, self.sampling = cache, sampling
        self.pending = torch.zeros(cache.layout.rows, dtype=torch.int64, device=cache.device)  # drawn, not yet run

    def __call__(self, numbers: Tensor, rows: int, used: int, longest: int) -> Drawn:
        places, positions = numbers[:rows], numbers[rows : 2 * rows]
        uniform, lengths = numbers[2 * rows : 3 * rows].view(torch.float64), numbers[3 * rows :]
        attend = self.cache.begin(places, lengths, used, longest)
        hidden = self.forward(self.embed(self.pending[places]), positions, attend)
        tokens, logprobs = self.draw(self.head(hidden), uniform)
        self.pending[places] = tokens
        return tokens, logprobs

    def draw(self, logits: Tensor, uniform: Tensor) -> Drawn:
        """Tokens from logits [R, V] and one uniform number a row."""
        return draw_tokens(logits, uniform, self.sampling)


def step_numbers(
    places: np.ndarray, positions: np.ndarray, uniform: np.ndarray, lengths: np.ndarray, rows: int, spare: int = 0
) -> np.ndarray:
    """What a step is given, as one array int64 [3 * rows + places].

    Args:
        places: [R], R <= rows: of the rows that take part, ascending.
        positions: [R] of their pending tokens.
        uniform: [R] float64 in [0, 1), whose bits are kept.
        lengths: of all places, the positions of its own that a row has in the cache.
        rows: to which the first three are filled up.
        spare: the place of the rows that fill up.
    """
    numbers = np.zeros(3 * rows + len(lengths), dtype=np.int64)
    numbers[: len(places)], numbers[len(places) : rows] = places, spare
    numbers[rows : rows + len(positions)] = positions
    numbers[2 * rows : 2 * rows + len(uniform)] = uniform.view(np.int64)
    numbers[3 * rows :] = lengths
    return numbers


def _next_logits(decoder: TransformerDecoder, hidden: Tensor) -> Tensor:
    """Logits [R, V] in fp32 (fp64 for an fp64 model), as the log-probabilities of training compute them."""
    return head_logits(hidden, decoder.head_weight)
