"""Queue work on a device before the host reads the results of earlier work, so that the device is never idle."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


def reads_late(device: torch.device) -> bool:
    """Return whether to read results one step late: on a GPU, which queues work. A CPU has computed when a call returns."""
    return device.type == "cuda"


def behind(items: Iterable[Item], device: torch.device) -> Iterator[Item]:
    """Yield the items in order; on a GPU each one after the next one was computed, so that its work is queued by then."""
    queued: deque[Item] = deque()
    for item in items:
        queued.append(item)
        del item  # no reference stays here: the item may hold device memory that the next one needs
        if len(queued) > int(reads_late(device)):
            yield queued.popleft()
    yield from queued
