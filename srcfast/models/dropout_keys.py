"""Keys of dropout: a function of a step, a tree's position in its global batch and a row of the tree, without a state.

So dropout drops the same entries however a batch is split across ranks and packed into forests, when a step is rerun, and
when activations are recomputed in backward.
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
    """Return whether an adapter in the model has dropout."""
    return any(getattr(module, "dropout", 0.0) for module in model.modules() if hasattr(module, "lora_A"))


def dropout_keys(forest: Forest, seed: int, step: int, positions: Sequence[int]) -> Tensor:
    """Compute the keys [T] int64 of a forest's rows, on the host, for `srcfast_kernels.dropout`.

    Args:
        seed: the training's seed, at least 0.
        step: number of the update.
        positions: of each of the forest's trees in the step's global batch.
    """
    seeds = [np.random.SeedSequence((seed, step, position)).generate_state(1, np.uint64)[0] for position in positions]
    sizes = [tree.num_tokens for tree in forest.trees]
    numbers = np.concatenate([np.arange(1, size + 1, dtype=np.uint64) for size in sizes])  # [T] each tree's from 1
    keys: np.ndarray = np.repeat(np.array(seeds, dtype=np.uint64), sizes) + numbers * np.uint64(GAMMA)
    keys = (keys ^ keys >> np.uint64(30)) * np.uint64(FIRST)
    keys = (keys ^ keys >> np.uint64(27)) * np.uint64(SECOND)
    return torch.from_numpy((keys ^ keys >> np.uint64(31)).view(np.int64))


def step_keys(seed: int, step: int, positions: Sequence[int]) -> Callable[[Forest], Tensor]:
    """Return a function that computes a forest's keys [T]; `positions` are those of this rank's items in the global batch."""
    return lambda forest: dropout_keys(forest, seed, step, [positions[i] for i in forest.indices])


@contextmanager
def dropping(decoder: TransformerDecoder, keys: Tensor | None) -> Iterator[None]:
    """Run forward passes within by these keys; their backward passes use the same ones."""
    decoder.dropout_keys = keys
    try:
        yield
    finally:
        decoder.dropout_keys = None
