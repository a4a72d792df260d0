"""Select the rows of a forest that a loss reads, on the host, ahead of the step; stored in the forest's cache."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcfast.data.forest import Forest


def response_logit_rows(forest: Forest) -> Tensor:
    """Return the rows that predict a token below a root, [M] int64, ascending, each once, on the host.

    A model that is given them computes its last layer for them alone, so of a prompt with its image only for the last row.
    """
    host = forest.host or forest
    if "response rows" not in host.cache:
        below_root = np.ones(host.num_tokens, dtype=bool)
        for starts, tree in zip(host.segment_start, host.trees, strict=True):
            below_root[starts[0] : starts[0] + tree.segments[0].tokens.size] = False
        host.cache["response rows"] = torch.from_numpy(np.unique(host.predictor.numpy()[below_root]))
    return host.cache["response rows"]


def row_positions(rows: np.ndarray, hidden: Tensor, forest: Forest, selected: Tensor) -> np.ndarray:
    """Return the positions of a forest's rows [n] in `hidden`, which has all rows [T, D] or the `selected` [M] ones [M, D]."""
    return rows if len(hidden) == forest.num_tokens else np.searchsorted(selected.numpy(), rows)


def supports_row_selection(model: Any) -> bool:
    """Return whether a model's `forward` takes `rows`, and computes their hidden states alone."""
    return "rows" in inspect.signature(model.forward).parameters
