"""Run a command on the ranks that torchrun has started."""

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
    """Join the ranks that `torchrun` has started, and yield this rank's settings: all ranks but 0 are quiet."""
    with distributed.process_group(timedelta(seconds=config.distributed.timeout_seconds), config.model.device):
        yield config if distributed.is_rank_zero() else config.replace(quiet=True)


def on_ranks(stage: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command, whose first argument is the settings, to run on all ranks and to explain errors of memory."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(config: Config, *arguments: Any) -> None:
            with on_all_ranks(config) as local, explain_out_of_memory(local, stage):
                command(local, *arguments)

        return run

    return decorate
