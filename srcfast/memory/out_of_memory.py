"""Report an out-of-memory error by the stage's forecast and the settings to change, in place of a traceback."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from srcfast.config.settings import Config
from srcfast.errors import OutOfMemory
from srcfast.memory.advice import advice
from srcfast.memory.model_sizes import USABLE
from srcfast.memory.plan import STAGES, device_memory, forecast_stage
from srcfast.units import show_bytes

# In the messages of torch, its BLAS libraries and the operating system.
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")


@contextmanager
def explain_out_of_memory(config: Config, stage: str) -> Iterator[None]:
    """Turn an out-of-memory error within into one with the stage's forecast and the settings to change.

    Args:
        config: the run's settings.
        stage: one of `STAGES`, or a section of the settings that has a token budget.

    Raises:
        OutOfMemory: in place of torch's and Python's own errors.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_explanation(config, stage, error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch, a GPU library or the operating system says that no memory is left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _NO_MEMORY)


def _explanation(config: Config, stage: str, error: BaseException) -> str:
    memory = device_memory(config)
    device = f"{show_bytes(memory)} on {config.model.device}" if math.isfinite(memory) else config.model.device
    detail = " ".join(str(error).split())[:200] or type(error).__name__
    stage = "candidates" if stage == "headroom" else stage
    if stage not in STAGES:
        return f"{stage}: expected to fit into {device}, found {detail}. Fix: lower {stage}.token_budget"
    forecast = forecast_stage(config, stage)
    # It did not fit, whatever the forecast: plan with at least a fifth less.
    changes = advice(config, stage, memory=memory, limit=min(memory, 0.8 * forecast.peak / USABLE))
    fix = "; then ".join(map(str, changes)) or "a device with more memory, or a smaller model"
    return f"{stage}: expected a peak of {forecast.text()} in {device}, found {detail}. Fix: {fix}"
