"""What captured steps look like from outside, without a GPU: results in shared memory, work done at each replay alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from helpers.small_lvlm import SmallLVLM
from srcfast.generation import buffers
from srcfast.generation import decode as decoding
from srcfast.generation.buffers import DecodingMemory
from srcfast.generation.kv_store import Layout
from srcfast.generation.sampling import Sampling

MOST = 4096  # numbers of a result


class SharedPool:
    """Calls as `captured_in(pool)` does. A capture does nothing; all graphs write their results to the same place."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.shared: dict[tuple[int, torch.dtype], Tensor] = {}  # of the results in their order

    def __call__(self, work: Any) -> tuple[Any, Callable[[], None]]:
        self.captures += 1
        pending = getattr(
            work.func, "pending", torch.zeros(1)
        )  # what the work changes, beside what it would write again
        before = pending.clone()
        results = work()
        pending.copy_(before)
        outputs = tuple(
            self.shared.setdefault((number, result.dtype), torch.empty(MOST, dtype=result.dtype))[: result.numel()]
            for number, result in enumerate(results)
        )

        def replay() -> None:
            self.replays += 1
            for held, new in zip(outputs, work(), strict=True):
                held.copy_(new)

        return outputs, replay


class StandInMemory(DecodingMemory):
    """A `DecodingMemory` as on a GPU: with caches of fixed size that are kept, and graphs by a stand-in."""

    def __init__(self, pool: SharedPool) -> None:
        super().__init__()
        self._stand_in = pool

    def _graphs(self, step: Any, layout: Layout) -> Any:
        return buffers.StepGraphs(step, layout, step.cache.device, self._stand_in)


def decode_by_graphs(
    lvlm: SmallLVLM,
    tasks: Sequence[Any],
    pool: SharedPool | None = None,
    memory: DecodingMemory | None = None,
    *,
    slots: int,
    width: int,
    limit: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
) -> int:
    """`decode` as it runs on a GPU with graphs."""
    longest = max(len(task.prompt.token_ids) for task in tasks)
    layout = Layout.of(min(slots, len(tasks)), width, longest, limit, on_gpu=True, spare=True)
    with torch.inference_mode():
        own = StandInMemory(pool or SharedPool()) if memory is None else memory
        return decoding._Decoding(lvlm.model, tasks, lvlm.features, layout, limit, sampling, own).run(None)
