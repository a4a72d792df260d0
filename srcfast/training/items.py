"""The types that a training is made of: items, loss, metrics, and the model's interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from srcfast.data.forest import Forest, Tree
from srcfast.errors import SrcfastError

Metrics = dict[str, Any]
Features = Callable[[Iterable[str]], Mapping[str, Tensor]]  # image keys -> [n, D] each
# (hidden [T, D], or [M, D] of the selected rows; forest; head weight [V, D]; items in the forest's order; denominator) ->
# (loss, metrics). The losses of a global batch's forests are added, and so are their metrics, except that of metrics named
# max_* the largest counts. A loss that waits for the device makes every step wait.
Loss = Callable[[Tensor, Forest, Tensor, Sequence["TrainingItem"], Any], tuple[Tensor, dict[str, Tensor]]]


class TrainableDecoder(Protocol):
    """The decoder of a `TrainableModel`."""

    checkpoint_layers: int  # layers a group whose activations the backward pass recomputes; 0: none are recomputed

    @property
    def head_weight(self) -> Tensor:
        """`[V, D]`."""


class TrainableModel(Protocol):
    """A model that `train` can train: `LVLM` and `TextModel`.

    A call `model(forest, features, rows=rows)` returns hidden states `[T, D]`, or those of the rows, `[M, D]`. A model without
    images takes no `features`, and a model that computes all rows of its last layer takes no `rows`.
    """

    training: bool

    @property
    def decoder(self) -> TrainableDecoder: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def train(self, mode: bool = True) -> Any: ...

    def __call__(self, forest: Forest, *features: Mapping[str, Tensor], **rows: Tensor) -> Tensor: ...


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
