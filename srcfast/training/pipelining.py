"""Queue work on a device before the host reads the results of earlier work, so that the device always has some."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


def reads_late(device: torch.device) -> bool:
    """Whether results are read after further work was queued: where work is queued on a device."""
    return device.type == "cuda"


def behind(items: Iterable[Item], device: torch.device) -> Iterator[Item]:
    """Yield the items in order; on a GPU each one only after the next one was made, whose work is then queued."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        del item  # it may hold what the device needs memory for
        if len(waiting) > int(reads_late(device)):
            yield waiting.popleft()
    yield from waiting
