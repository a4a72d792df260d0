"""The types that a training is made of: items, objective and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from srcfast.data.forest import Forest, Tree
from srcfast.data.logit_rows import supports_row_selection
from srcfast.errors import SrcfastError
from srcfast.memory.flops import tokens_below_roots
from srcfast.models.head import Head
from srcfast.models.protocols import HasDecoder

Metrics = dict[str, Any]
Features = Callable[[Iterable[str]], Mapping[str, Tensor]]  # image keys -> [n, D] each
# (hidden [T, D], or [M, D] of the selected rows; forest; head weight [V, D]; items in the forest's order; denominator) ->
# (loss, metrics). The losses of a global batch's forests are added, and so are their metrics, except that of metrics named
# max_* the largest counts. A loss that waits for the device makes every step wait.
Loss = Callable[[Tensor, Forest, Head, Sequence["TrainingItem"], Any], tuple[Tensor, dict[str, Tensor]]]


class NotFinite(SrcfastError):
    """A loss or gradient of this step is not finite; the weights are those before the step."""

    def __init__(self, step: int, message: str) -> None:
        self.step = step
        super().__init__(message)


@dataclass(frozen=True)
class TrainingItem:
    """A tree to train on.

    Attributes:
        tree: its segments.
        meta: what the loss needs beside the tokens.
        images: names of its images that don't depend on their directory; the tree's image keys are then the files. None: there
            are no files, and the keys identify the images.
    """

    tree: Tree
    meta: Any = None
    images: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Objective:
    """What a training minimises.

    Attributes:
        loss: of one forest, see `Loss`.
        denominator: of a global batch's items; handed to `loss`.
        rows: the rows `[M]` of a forest, ascending, int64, on the host, whose hidden states the loss reads; None: all. A
            model whose `forward` takes `rows` then computes its last layer for these alone, and the loss is given
            `[M, D]`. The function stores its result in the forest's cache: a worker calls it first.
        head_rows: how many rows of a forest the head is applied to, for MFU.
    """

    loss: Loss
    denominator: Callable[[Sequence[TrainingItem]], Any]
    rows: Callable[[Forest], Tensor] | None = None
    head_rows: Callable[[Forest], int] = tokens_below_roots

    def supported_by(self, model: HasDecoder) -> Objective:
        """Return the objective with `rows` only if the model's `forward` takes them."""
        return self if supports_row_selection(model) else replace(self, rows=None)
