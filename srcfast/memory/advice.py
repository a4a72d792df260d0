"""What to change until a stage fits into memory, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from srcfast.config.settings import Config
from srcfast.memory.forecast import Forecast, least_checkpointing, most_that_fit
from srcfast.memory.plan import TRAINING, Lengths, forecast_stage, node_ranks, policy_sizes, typical_tree
from srcfast.units import show_bytes


@dataclass(frozen=True)
class Change:
    """A setting to change, and the stage's peak once it and those before it are changed."""

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
    """What to change, in this order, until the stage fits; each on top of those before. Empty where it fits as it is.

    What costs least comes first. For training: recomputing activations, 4-bit weights, fewer tokens at once, an optimizer
    in 8 bits, one whose moments are paged out, weights in 16 bits, a base that the node's ranks share out, a lower rank.
    Fewer tokens, samples or beams are the largest number that fits; where not even the least does, the others come first.

    Args:
        memory: bytes that the device has.
        limit: bytes to fit into, where they are to be fewer.
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
            value = "auto" if limit == memory else _least_recomputed(config, stage, memory, limit, lengths)
        elif not stated:
            value = largest_value(config, setting, stage, memory=memory, limit=limit, lengths=lengths)
        changed = with_setting(config, setting, value)
        then = forecast_stage(changed, stage, memory=memory, lengths=lengths)
        if not stated and not then.fits(limit) and setting not in later:
            later.append(setting)  # alone it is not enough: first what leaves room for more of it
            options.append((setting, None))
        elif then.peak < now.peak:
            changes.append(Change(setting, value, then))
            config, now = changed, then
    return changes


def _least_recomputed(config: Config, stage: str, memory: float, limit: float, lengths: Lengths) -> int:
    """The group of layers that "auto" would take for a device of `limit` bytes."""

    def peak(every: int) -> Forecast:
        changed = with_setting(config, f"{stage}.activation_checkpointing", every)
        return forecast_stage(changed, stage, memory=memory, lengths=lengths)

    return least_checkpointing(peak, policy_sizes(config).shapes.layers, limit)


def _options(config: Config, stage: str) -> Iterator[tuple[str, Any]]:
    """Settings and values to try, in order; None for the largest value that fits."""
    nf4 = [("model.quantize", "nf4")] if config.model.quantize == "none" else []
    half = [("model.dtype", "bfloat16")] if config.model.dtype == "float32" else []
    share = [("distributed.shard", True)] if node_ranks(config) > 1 and not config.distributed.shard else []
    if stage in TRAINING:
        yield f"{stage}.activation_checkpointing", "auto"
        yield from nf4
        yield "model.vision_offload", True
        yield f"{stage}.token_budget", None
        yield f"{stage}.optimizer", "adamw_8bit"
        yield f"{stage}.optimizer", "paged_adamw_8bit"
        yield from [*half, *share]
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
        yield from [*nf4, *half, *share]
    else:
        yield f"{stage}.batch_size", None
        yield from nf4
        if stage == "candidates":
            yield "candidates.num_beams", None
        yield from [*half, *share]


def largest_value(
    config: Config,
    setting: str,
    stage: str,
    *,
    memory: float,
    limit: float | None = None,
    lengths: Lengths = Lengths(),  # noqa: B008
) -> int:
    """The largest token budget, batch or number of beams with which the stage fits; the least there is where none does."""

    def fits(value: int) -> bool:
        if setting.endswith("token_budget"):
            found = forecast_stage(config, stage, memory=memory, lengths=lengths, token_budget=value * 16)
        else:
            found = forecast_stage(with_setting(config, setting, value), stage, memory=memory, lengths=lengths)
        return found.fits(memory if limit is None else limit)

    if setting.endswith("token_budget"):
        tree = typical_tree(config, stage, lengths).num_tokens
        return max(16 * most_that_fit(fits, 1 << 20), tree)
    return max(1, most_that_fit(fits, 256 if setting.endswith("beams") else 1 << 12))


def with_setting(config: Config, setting: str, value: Any) -> Config:
    """The settings with one of them, `section.name`, changed."""
    section, _, name = setting.partition(".")
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
