"""A command on the ranks that torchrun has started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any

from srcfast import distributed
from srcfast.config.settings import Config
from srcfast.memory.out_of_memory import explain_out_of_memory


@contextmanager
def on_all_ranks(config: Config) -> Iterator[Config]:
    """The settings as this rank has them, among the ranks that `torchrun` has started: only rank 0 shows progress."""
    with distributed.process_group(timedelta(seconds=config.distributed.timeout_seconds), config.model.device):
        yield config if distributed.is_rank_zero() else config.model_copy(update={"quiet": True})


def on_ranks(stage: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a command, of which the settings are the first argument, on all ranks; explain where memory runs out."""

    def of(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(config: Config, *arguments: Any) -> None:
            with on_all_ranks(config) as local, explain_out_of_memory(local, stage):
                command(local, *arguments)

        return run

    return of
