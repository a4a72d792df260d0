"""Prepare steps on the host, ahead of time: pack forests, make index maps, decode and preprocess images.

A step's content is a pure function of its number (and through it of seed and epoch). This process decides, when it requests a
step, which of its images still have to be prepared. So the number of worker processes changes time alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from srcfast.config.settings import TrainingConfig
from srcfast.data.forest import Forest, Tree
from srcfast.errors import SrcfastError

AHEAD = 2  # steps that each worker prepares before they are needed

Request = tuple[int, tuple[str, ...]]  # a step, and the keys of the images to prepare


@dataclass
class PackedStep:
    """The part of a global batch that a rank runs, on the host; it may be empty.

    Attributes:
        step: its number.
        indices: of its items, in the batch's order.
        forests: their `indices` are positions in `indices`.
        prepared: inputs of the vision tower, by image key.
    """

    step: int
    indices: Sequence[int]
    forests: list[Forest]
    prepared: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[str]:
        """Distinct image keys, in order of appearance."""
        return list(dict.fromkeys(key for forest in self.forests for key in forest.images))

    def pin_memory(self) -> PackedStep:
        """Copy the images to page-locked memory. Forests are small: they are copied there when they are sent to the device."""
        prepared = {
            key: {name: tensor.pin_memory() for name, tensor in image.items()} for key, image in self.prepared.items()
        }
        return replace(self, prepared=prepared)


@dataclass(frozen=True)
class _Steps(Dataset[PackedStep]):
    """Packs the step of a request; the fields are the arguments of `packed_steps`."""

    trees: Sequence[Tree]
    batch_of: Callable[[int], Sequence[int]]
    settings: TrainingConfig
    plan: Callable[[Forest], object] | None
    prepare: Callable[[str], dict[str, Tensor]] | None = None

    def __getitem__(self, request: Request) -> PackedStep:
        step, image_keys = request
        indices = self.batch_of(step)
        trees = [self.trees[i] for i in indices]
        forests = Forest.pack(trees, self.settings.token_budget, max_trees=self.settings.micro_batch_size)
        for forest in forests:
            if self.plan is not None:
                self.plan(forest)
        packed = PackedStep(step, indices, forests)
        if self.prepare is not None:
            for key in image_keys:
                # An image that can't be read is skipped: the training process reads it again, and raises the error.
                with suppress(SrcfastError):
                    packed.prepared[key] = self.prepare(key)
        return packed


def packed_steps(
    trees: Sequence[Tree],
    steps: Iterable[int],
    batch_of: Callable[[int], Sequence[int]],
    settings: TrainingConfig,
    *,
    features: Any = None,
    plan: Callable[[Forest], object] | None = None,
    workers: int = 0,
    pin: bool = False,
) -> Generator[PackedStep, None, None]:
    """Yield the steps in order, while workers prepare later ones. Closing the generator ends the workers.

    Args:
        trees: of all items.
        steps: numbers of the steps to do.
        batch_of: a step's items, as indices.
        settings: with the limits of a forest.
        features: where it has `missing(keys)` and `prepare(key)`, as `ImageFeatures` does, the workers prepare those images
            of a step that are missing when the step is requested.
        plan: called on every forest on the host; stores its index maps in the forest's cache.
        workers: processes; 0: each step is packed in this process when it is needed, and `features` prepares its images.
        pin: copy images that the workers prepared to page-locked memory.
    """
    if not workers:
        packed = _Steps(trees, batch_of, settings, plan)
        for step in steps:
            yield packed[step, ()]
        return
    can_prepare = hasattr(features, "missing") and hasattr(features, "prepare")

    def requests() -> Iterator[Request]:
        for step in steps:  # the loader takes one request at a time, as workers become free
            keys = dict.fromkeys(key for i in batch_of(step) for key in trees[i].images)
            yield step, tuple(features.missing(keys)) if can_prepare else ()

    loader: DataLoader[PackedStep] = DataLoader(
        _Steps(trees, batch_of, settings, plan, features.prepare if can_prepare else None),
        batch_size=None,
        sampler=requests(),
        num_workers=workers,
        prefetch_factor=AHEAD,
        collate_fn=_identity,
        pin_memory=pin,
        generator=torch.Generator(),  # else the workers' seed would be drawn from the caller's generator
        worker_init_fn=_leave_process_group,
        multiprocessing_context="fork",  # workers share the trees, and touch no GPU
    )
    yield from loader


def _leave_process_group(worker: int) -> None:
    """Put a worker into a separate process group. A terminal sends SIGINT to the whole group of the training, and would end the
    workers while it still needs them for its current step.
    """
    os.setpgid(0, 0)


def _identity(step: PackedStep) -> PackedStep:
    return step
