"""Which rows of a forest a loss reads: found on the host, ahead of the step, and kept with the forest."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcfast.data.forest import Forest


def response_logit_rows(forest: Forest) -> Tensor:
    """The rows that predict a token below a root, [M] int64, ascending, each once, on the host.

    A model that is given them computes its last layer for them alone: of a prompt with an image nothing but its last row.
    """
    host = forest.host or forest
    if "response rows" not in host.cache:
        below = np.ones(host.num_tokens, dtype=bool)
        for starts, tree in zip(host.segment_start, host.trees, strict=True):
            below[starts[0] : starts[0] + tree.segments[0].tokens.size] = False
        host.cache["response rows"] = torch.from_numpy(np.unique(host.predictor.numpy()[below]))
    return host.cache["response rows"]


def row_positions(rows: np.ndarray, hidden: Tensor, forest: Forest, given: Tensor) -> np.ndarray:
    """Where the hidden states of a forest's rows [n] are: themselves in `hidden` [T, D], or among the `given` [M] in [M, D]."""
    return rows if len(hidden) == forest.num_tokens else np.searchsorted(given.numpy(), rows)


def supports_row_selection(model: Any) -> bool:
    """Whether a model's `forward` takes `rows`, those whose hidden states are wanted."""
    return "rows" in inspect.signature(model.forward).parameters
