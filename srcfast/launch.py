"""What torchrun says to a process by environment variables, checked before anything relies on them; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from srcfast.errors import ConfigError

FIX = "start srcfast by torchrun, or unset the variable"


@dataclass(frozen=True)
class Launch:
    """A process's rank among those that torchrun has started; without torchrun the only one.

    Attributes:
        by_torchrun: whether torchrun has started it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    by_torchrun: bool = False


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read the variables.

    Raises:
        ConfigError: one is no whole number, or out of bounds, or is missing beside the others.
    """
    world_size = whole_number(environment, "WORLD_SIZE", 1, 1, 1 << 20)
    rank = whole_number(environment, "RANK", 0, 0, world_size - 1)
    local_world_size = whole_number(environment, "LOCAL_WORLD_SIZE", world_size, 1, world_size)
    local_rank = whole_number(environment, "LOCAL_RANK", 0, 0, local_world_size - 1)
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    if (by_torchrun or world_size > 1) and missing:
        cause = "TORCHELASTIC_RUN_ID" if by_torchrun else f"WORLD_SIZE={world_size}"
        raise ConfigError(f"{cause}: expected {', '.join(needed)} beside it, found no {', '.join(missing)}. Fix: {FIX}")
    if world_size > 1:
        whole_number(environment, "MASTER_PORT", 0, 0, (1 << 16) - 1)
    return Launch(rank, world_size, local_rank, by_torchrun)


def whole_number(environment: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    """Read a variable, or its default. Raises ConfigError where it is no whole number, or out of bounds."""
    text = environment.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise ConfigError(f"{name}: expected a whole number from {least} to {most}, found {text!r}. Fix: {FIX}")
    return int(text)
