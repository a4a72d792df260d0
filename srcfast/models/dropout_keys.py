"""What dropout drops is a function of a step, a tree's place in its global batch and a row of the tree: no generator, no state.

So it is the same however a batch is dealt over ranks and packed into forests, when a step is run again, and when activations
are computed a second time in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from srcfast.data.forest import Forest
from srcfast.models.protocols import TransformerDecoder

# SplitMix64 (Steele, Lea, Flood, 2014, "Fast splittable pseudorandom number generators")
GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def drops(model: nn.Module) -> bool:
    """Whether an adapter in the model has dropout."""
    return any(getattr(part, "dropout", 0.0) for part in model.modules() if hasattr(part, "lora_A"))


def dropout_keys(forest: Forest, seed: int, step: int, places: Sequence[int]) -> Tensor:
    """The keys [T] int64 of a forest's rows, on the host, for `srcfast_kernels.dropout`.

    Args:
        seed: of the training, from 0.
        step: number of the update.
        places: of each of the forest's trees in the step's global batch.
    """
    seeds = [np.random.SeedSequence((seed, step, place)).generate_state(1, np.uint64)[0] for place in places]
    sizes = [tree.num_tokens for tree in forest.trees]
    numbers = np.concatenate([np.arange(1, size + 1, dtype=np.uint64) for size in sizes])  # [T] each tree's from 1
    keys: np.ndarray = np.repeat(np.array(seeds, dtype=np.uint64), sizes) + numbers * np.uint64(GAMMA)
    keys = (keys ^ keys >> np.uint64(30)) * np.uint64(FIRST)
    keys = (keys ^ keys >> np.uint64(27)) * np.uint64(SECOND)
    return torch.from_numpy((keys ^ keys >> np.uint64(31)).view(np.int64))


def step_keys(seed: int, step: int, places: Sequence[int]) -> Callable[[Forest], Tensor]:
    """Dropout's keys [T] of a step's forests; `places` in the global batch are those of the items of this rank's share."""
    return lambda forest: dropout_keys(forest, seed, step, [places[i] for i in forest.indices])


@contextmanager
def dropping(decoder: TransformerDecoder, keys: Tensor | None) -> Iterator[None]:
    """A forward pass within drops by these keys; its backward pass keeps them."""
    decoder.dropout_keys = keys
    try:
        yield
    finally:
        decoder.dropout_keys = None
