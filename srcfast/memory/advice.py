"""What to change until a stage fits into memory, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from srcfast.config.settings import Config
from srcfast.memory.forecast import Forecast, largest_fitting
from srcfast.memory.plan import TRAINING, Lengths, forecast_stage, node_ranks, typical_tree
from srcfast.units import show_bytes


@dataclass(frozen=True)
class Change:
    """A setting to change, and the stage's forecast once it and the changes before it are made."""

    setting: str
    value: Any
    forecast: Forecast

    def __str__(self) -> str:
        return f"{self.setting}={self.value} (forecast {show_bytes(self.forecast.peak)})"


def advice(
    config: Config,
    stage: str,
    *,
    memory: float,
    limit: float | None = None,
    lengths: Lengths = Lengths(),  # noqa: B008
) -> list[Change]:
    """List the changes, each on top of those before, that make a stage fit; none if it fits already.

    The cheapest change comes first. For training: recomputing activations, 4-bit weights, fewer tokens at once, an optimizer
    in 8 bits, one whose moments are paged out, weights in 16 bits, a base that is sharded over the node's ranks, a lower rank.
    Fewer tokens, samples or beams are the largest number that fits; where not even the smallest fits, the others come first.

    Args:
        memory: bytes of the device.
        limit: bytes to fit into, if fewer than the device has.
        config, stage, lengths: as in `forecast_stage`.
    """
    limit = memory if limit is None else limit
    changes: list[Change] = []
    now = forecast_stage(config, stage, memory=memory, lengths=lengths)
    options, later = list(_options(config, stage)), []
    while options and not now.fits(limit):
        setting, value = options.pop(0)
        stated = value is not None
        if setting.endswith("activation_checkpointing"):
            if limit != memory:  # "auto" would fill the device
                changed = with_setting(config, setting, value)
                value = forecast_stage(changed, stage, memory=memory, limit=limit, lengths=lengths).checkpoint_every
        elif not stated:
            value = largest_value(config, setting, stage, memory=memory, limit=limit, lengths=lengths)
        changed = with_setting(config, setting, value)
        then = forecast_stage(changed, stage, memory=memory, lengths=lengths)
        if not stated and not then.fits(limit) and setting not in later:
            later.append(setting)  # not enough by itself: changed once the other changes have freed memory
            options.append((setting, None))
        elif then.peak < now.peak:
            changes.append(Change(setting, value, then))
            config, now = changed, then
    return changes


def _options(config: Config, stage: str) -> Iterator[tuple[str, Any]]:
    """Yield settings and values to try, in order; None stands for the largest value that fits."""
    nf4 = [("model.quantize", "nf4")] if config.model.quantize == "none" else []
    half = [("model.dtype", "bfloat16")] if config.model.dtype == "float32" else []
    shard = [("distributed.shard", True)] if node_ranks(config) > 1 and not config.distributed.shard else []
    if stage in TRAINING:
        yield f"{stage}.activation_checkpointing", "auto"
        yield from nf4
        yield "model.vision_offload", True
        yield f"{stage}.token_budget", None
        yield f"{stage}.optimizer", "adamw_8bit"
        yield f"{stage}.optimizer", "paged_adamw_8bit"
        yield from [*half, *shard]
        r = config.lora.r
        while r > 8:
            r //= 2
            yield "lora.r", r
    elif stage == "scores":
        yield "scorer.token_budget", None
        if config.scorer.dtype == "float32":
            yield "scorer.dtype", "float16"
    elif stage == "preferences":
        yield "dpo.token_budget", None
        yield from [*nf4, *half, *shard]
    else:
        yield f"{stage}.batch_size", None
        yield from nf4
        if stage == "candidates":
            yield "candidates.num_beams", None
        yield from [*half, *shard]


def largest_value(
    config: Config,
    setting: str,
    stage: str,
    *,
    memory: float,
    limit: float | None = None,
    lengths: Lengths = Lengths(),  # noqa: B008
) -> int:
    """Return the largest token budget, batch or number of beams with which the stage fits; the smallest one if none does."""

    def fits(value: int) -> bool:
        if setting.endswith("token_budget"):
            forecast = forecast_stage(config, stage, memory=memory, lengths=lengths, token_budget=value * 16)
        else:
            forecast = forecast_stage(with_setting(config, setting, value), stage, memory=memory, lengths=lengths)
        return forecast.fits(memory if limit is None else limit)

    if setting.endswith("token_budget"):
        tree = typical_tree(config, stage, lengths).num_tokens
        return max(16 * largest_fitting(fits, 1 << 20), tree)
    return max(1, largest_fitting(fits, 256 if setting.endswith("beams") else 1 << 12))


def with_setting(config: Config, setting: str, value: Any) -> Config:
    """Return the settings with one of them, `section.name`, changed."""
    section, _, name = setting.partition(".")
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
