"""What a step needs of the host, ahead of it: forests packed, index maps made, images decoded and preprocessed.

A step's content is a pure function of its number (and through it of seed and epoch); which of its images still have to be
prepared is decided in this process when the step is asked for. So the number of worker processes changes nothing but time.
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

from srcfast.data.forest import Forest, Tree
from srcfast.errors import SrcfastError

AHEAD = 2  # steps that each worker prepares before they are asked for

Request = tuple[int, tuple[str, ...]]  # a step, and its images that are to be prepared


@dataclass
class PackedStep:
    """A rank's share of a global batch, on the host; it may be empty.

    Attributes:
        step: its number.
        indices: of its items, in the batch's order.
        forests: whose `indices` are places in `indices`.
        prepared: images by key, ready for the vision tower.
    """

    step: int
    indices: Sequence[int]
    forests: list[Forest]
    prepared: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[str]:
        """Distinct keys, in order of appearance."""
        return list(dict.fromkeys(key for forest in self.forests for key in forest.images))

    def pin_memory(self) -> PackedStep:
        """With images in page-locked memory; forests, which are small, are put there when they are sent."""
        prepared = {key: {name: part.pin_memory() for name, part in own.items()} for key, own in self.prepared.items()}
        return replace(self, prepared=prepared)


class _Steps(Dataset[PackedStep]):
    def __init__(
        self,
        trees: Sequence[Tree],
        batch_of: Callable[[int], Sequence[int]],
        token_budget: int,
        max_trees: int,
        prepare: Callable[[str], dict[str, Tensor]] | None,
        plan: Callable[[Forest], object] | None,
    ) -> None:
        self.trees, self.batch_of = trees, batch_of
        self.token_budget, self.max_trees = token_budget, max_trees
        self.prepare, self.plan = prepare, plan

    def __getitem__(self, request: Request) -> PackedStep:
        step, wanted = request
        indices = self.batch_of(step)
        forests = Forest.pack([self.trees[i] for i in indices], self.token_budget, max_trees=self.max_trees)
        for forest in forests:
            if self.plan is not None:
                self.plan(forest)
        made = PackedStep(step, indices, forests)
        if self.prepare is not None:
            for key in wanted:
                # An image that can't be read is left to the training process, whose error it then is.
                with suppress(SrcfastError):
                    made.prepared[key] = self.prepare(key)
        return made


def packed_steps(
    trees: Sequence[Tree],
    steps: Iterable[int],
    batch_of: Callable[[int], Sequence[int]],
    *,
    token_budget: int,
    max_trees: int,
    features: Any = None,
    plan: Callable[[Forest], object] | None = None,
    workers: int = 0,
    pin: bool = False,
) -> Generator[PackedStep, None, None]:
    """The steps one after the other, some of them ahead; to be closed, with which its processes end.

    Args:
        trees: of all items.
        steps: numbers of the steps to do.
        batch_of: a step's items, as indices.
        token_budget: most tokens in a forest.
        max_trees: most trees in a forest.
        features: where it has `missing(keys)` and `prepare(key)`, as `ImageFeatures` does, the workers prepare those images
            of a step that are missing when the step is asked for.
        plan: called on every forest on the host; keeps its index maps in the forest's cache.
        workers: processes; 0: each step is made here when its turn comes, its images by `features` itself.
        pin: images that the workers prepared into page-locked memory.
    """
    if not workers:
        made = _Steps(trees, batch_of, token_budget, max_trees, None, plan)
        for step in steps:
            yield made[step, ()]
        return
    takes_prepared = hasattr(features, "missing") and hasattr(features, "prepare")

    def requests() -> Iterator[Request]:
        for step in steps:  # asked for one by one, as workers become free
            keys = dict.fromkeys(key for i in batch_of(step) for key in trees[i].images)
            yield step, tuple(features.missing(keys)) if takes_prepared else ()

    loader: DataLoader[PackedStep] = DataLoader(
        _Steps(trees, batch_of, token_budget, max_trees, features.prepare if takes_prepared else None, plan),
        batch_size=None,
        sampler=requests(),
        num_workers=workers,
        prefetch_factor=AHEAD,
        collate_fn=_as_it_is,
        pin_memory=pin,
        generator=torch.Generator(),  # else a seed for the workers would be drawn from the caller's numbers
        worker_init_fn=_leave_process_group,
        multiprocessing_context="fork",  # workers share the trees, and touch no GPU
    )
    yield from loader


def _leave_process_group(worker: int) -> None:
    """A signal that asks the whole group to stop would else end the workers, while the training needs them for its step."""
    os.setpgid(0, 0)


def _as_it_is(made: PackedStep) -> PackedStep:
    return made
