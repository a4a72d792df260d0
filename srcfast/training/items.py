"""The types that a training is made of: items, loss, metrics, and the model's interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from srcfast.data.forest import Forest, Tree
from srcfast.errors import SrcfastError

Metrics = dict[str, Any]
Features = Callable[[Iterable[str]], Mapping[str, Tensor]]  # image keys -> [n, D] each
# (hidden [T, D], or [M, D] of the selected rows; forest; head weight [V, D]; items in the forest's order; denominator) ->
# (loss, metrics). The losses of a global batch's forests are added, and so are their metrics, except that of metrics named
# max_* the largest counts. A loss that waits for the device makes every step wait.
Loss = Callable[[Tensor, Forest, Tensor, Sequence["TrainingItem"], Any], tuple[Tensor, dict[str, Tensor]]]


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
