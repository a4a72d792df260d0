"""`srcfast estimate`: a run's memory and time by stage, what fits, and what to change where it doesn't."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch

from srcfast.cli.table import table
from srcfast.config.settings import Config, DatasetConfig
from srcfast.data.forest import Forest
from srcfast.memory.activations import ForestSizes, activation_bytes
from srcfast.memory.advice import advice, largest_value, with_setting
from srcfast.memory.flops import attended_of, decode_flops, forward_flops, peak_flops, training_flops
from srcfast.memory.forecast import Forecast, moment_bytes, recomputed_layers
from srcfast.memory.model_sizes import ModelSizes
from srcfast.memory.plan import (
    DECODING,
    STAGES,
    TRAINING,
    Lengths,
    device_memory,
    forecast_stage,
    policy_sizes,
    scorer_sizes,
    sharing_ranks,
    typical_tree,
)
from srcfast.units import parse_bytes, show_bytes

UNKNOWN = 1000  # samples, where the settings don't say how many there are
# What can be as large as memory allows, by stage.
LARGEST = {
    "rationale": ("rationale.token_budget",),
    "candidates": ("candidates.batch_size", "candidates.num_beams"),
    "scores": ("scorer.token_budget",),
    "preferences": ("dpo.token_budget",),
    "dpo": ("dpo.token_budget",),
    "evaluation": ("evaluation.batch_size",),
}


@dataclass(frozen=True)
class StageEstimate:
    """One stage of a run; `seconds` and `fits` are None where no rate and no memory are known."""

    forecast: Forecast
    fits: bool | None
    largest: dict[str, int]  # settings and their largest values
    largest_kept: int | None  # token budget of training with which nothing is recomputed
    change: tuple[str, ...]
    samples: int
    samples_known: bool
    times: int  # that the stage is run
    flops: float  # necessary, of all of these
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return (
            self.forecast.to_json()
            | {name: value for name, value in asdict(self).items() if name not in ("forecast", "change")}
            | {"change": list(self.change)}
        )


def estimate(
    config: Config,
    memory: str | None,
    flops: float | None,
    mfu: float,
    lengths: Lengths,
    as_json: bool,
) -> None:
    """Print the forecast.

    Args:
        config: the run's settings.
        memory: of the card, such as `12GiB`; None: the settings' `memory`, or what their device has.
        flops: floating-point operations a second that the run is taken to reach; None: `mfu` of the device's.
        mfu: see there.
        lengths: of a typical sample.
        as_json: JSON instead of tables.
    """
    room = device_memory(config) if memory is None else float(parse_bytes(memory))
    rate = flops or _device_rate(config, mfu)
    stages = [_estimate_stage(config, stage, room, rate, lengths) for stage in STAGES]
    model = policy_sizes(config)
    summary = _summary(config, model, room, lengths) | {
        "assumed": asdict(lengths)
        | {"image": 0 if model.vision is None else model.vision.image_tokens, "flops_per_second": rate},
        "stages": [stage.to_json() for stage in stages],
    }
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    _print_model(config, summary, room)
    _print_stages(stages, summary["assumed"] | {"layers": model.shapes.layers})


def _device_rate(config: Config, mfu: float) -> float | None:
    device = torch.device(config.model.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    return mfu * peak_flops(device, getattr(torch, config.model.dtype))


def _estimate_stage(config: Config, stage: str, room: float, rate: float | None, lengths: Lengths) -> StageEstimate:
    forecast = forecast_stage(config, stage, memory=room, lengths=lengths)
    known = math.isfinite(room)
    count = _count(config, stage)
    times = {"rationale": 1, "evaluation": config.iterations + 2}.get(stage, config.iterations)
    necessary = times * (count or UNKNOWN) * sample_flops(config, stage, lengths)
    return StageEstimate(
        forecast=forecast,
        fits=forecast.fits(room) if known else None,
        largest={name: largest_value(config, name, stage, memory=room, lengths=lengths) for name in LARGEST[stage]}
        if known
        else {},
        largest_kept=_largest_kept(config, stage, room, lengths) if known and stage in TRAINING else None,
        change=tuple(map(str, advice(config, stage, memory=room, lengths=lengths))) if known else (),
        samples=count or UNKNOWN,
        samples_known=bool(count),
        times=times,
        flops=necessary,
        seconds=None if rate is None else necessary / rate,
    )


def _largest_kept(config: Config, stage: str, room: float, lengths: Lengths) -> int:
    keeping = with_setting(config, f"{stage}.activation_checkpointing", 0)
    return largest_value(keeping, f"{stage}.token_budget", stage, memory=room, lengths=lengths)


def _count(config: Config, stage: str) -> int:
    """Samples of a stage, as far as the settings say; 0 where they don't."""
    if stage == "evaluation":
        return _known(config.data.evaluation)
    use = "rationale" if stage == "rationale" else "calibration"
    count = config.rationale.samples if stage == "rationale" else config.candidates.samples
    count = count or _known([one for one in config.data.train if use in one.use])
    return count * (config.curation.pairs_per_sample if stage in ("preferences", "dpo") else 1)


def _known(datasets: Sequence[DatasetConfig]) -> int:
    limits = [one.limit for one in datasets]
    return sum(limits) if all(limits) else 0


def sample_flops(config: Config, stage: str, lengths: Lengths) -> float:
    """Necessary FLOPs of one sample in a stage: in training over all epochs, in decoding with all of its beams."""
    tree = typical_tree(config, stage, lengths)
    model = scorer_sizes(config) if stage == "scores" else policy_sizes(config)
    one = ForestSizes.of(
        Forest.of([tree]), "cuda"
    )  # the sizes that memory on a GPU depends on say all that is needed here
    adapter = 0 if model.lora is None else model.lora.parameters
    if stage in TRAINING:
        section = config.rationale if stage == "rationale" else config.dpo
        passes = training_flops(model.shapes, one.tokens, one.attended, one.head_rows, adapter)
        return section.epochs * passes + _image_flops(model)
    if stage in DECODING:
        rows = config.candidates.num_beams * config.candidates.proposals if stage == "candidates" else 1
        seen = rows * attended_of(tree.num_tokens, lengths.response)
        prompt = forward_flops(model.shapes, one.tokens, one.attended, 1, adapter) + _image_flops(model)
        return prompt + decode_flops(model.shapes, rows * lengths.response, seen, adapter)
    head_rows = 0 if stage == "scores" else one.head_rows
    return forward_flops(model.shapes, one.tokens, one.attended, head_rows, adapter) + _image_flops(model)


def _image_flops(model: ModelSizes) -> float:
    if model.vision is None:
        return 0.0
    weights = model.parameters.get("vision", 0) + model.parameters.get("projector", 0)
    return 2.0 * weights * model.vision.patches


# Shown ------------------------------------------------------------------------------------------------------


def _summary(config: Config, model: ModelSizes, room: float, lengths: Lengths) -> dict[str, Any]:
    """What doesn't depend on the stage."""
    adapter = 0 if model.lora is None else model.lora.parameters
    pair = ForestSizes.of(Forest.of([typical_tree(config, "dpo", lengths)]), model.device_type)
    casts = activation_bytes(model, pair.times(0)).most  # of the adapter: they don't depend on tokens
    weights = model.weight_bytes + model.quantisation_bytes
    moments = moment_bytes(config.dpo.optimizer, adapter, model.device_type)
    return {
        "parameters": model.parameters,
        "total_parameters": sum(model.parameters.values()),
        "shapes": asdict(model.shapes),
        "weight_bytes": weights,
        "quantisation_bytes": model.quantisation_bytes,
        "adapter_parameters": adapter,
        "adapter_bytes": 4 * adapter,
        "optimizer_bytes": 4 * adapter + moments,
        "fixed_bytes": weights + 8 * adapter + moments,
        "activation_bytes_per_token": (activation_bytes(model, pair).most - casts) / pair.tokens,
        "kv_bytes_per_token": 2 * model.shapes.layers * model.shapes.key * model.dtype_bytes,
        "memory": room if math.isfinite(room) else None,
        "largest_token_budget": largest_value(config, "dpo.token_budget", "dpo", memory=room, lengths=lengths)
        if math.isfinite(room)
        else None,
    }


def _print_model(config: Config, summary: dict[str, Any], room: float) -> None:
    ranks = sharing_ranks(config)
    shared = f", layers shared out over {ranks} ranks" if ranks > 1 else ""
    rows = [(f"parameters: {part}", f"{count:,}") for part, count in summary["parameters"].items()]
    rows += [
        ("parameters", f"{summary['total_parameters']:,}"),
        ("adapter's parameters", f"{summary['adapter_parameters']:,}"),
        (
            f"weights ({config.model.dtype}, quantize {config.model.quantize}{shared})",
            show_bytes(summary["weight_bytes"]),
        ),
        ("of these, scales of 4-bit weights", show_bytes(summary["quantisation_bytes"])),
        ("adapter", show_bytes(summary["adapter_bytes"])),
        ("gradients and optimizer", show_bytes(summary["optimizer_bytes"])),
        ("activations, a token trained on", show_bytes(summary["activation_bytes_per_token"])),
        ("keys and values, a token decoded", show_bytes(summary["kv_bytes_per_token"])),
    ]
    if math.isfinite(room):
        rows.append(
            (f"largest token budget of DPO in {show_bytes(room)}", f"{summary['largest_token_budget']:,} tokens")
        )
    table(str(config.model.path), rows)


def _print_stages(stages: Sequence[StageEstimate], assumed: dict[str, Any]) -> None:
    rows: list[tuple[str, ...]] = [("stage", "peak", "fits", "samples", "PFLOP", "time")]
    for stage in stages:
        times = "" if stage.times == 1 else f"{stage.times} x "
        rows.append(
            (
                stage.forecast.stage,
                show_bytes(stage.forecast.peak),
                "" if stage.fits is None else "yes" if stage.fits else "no",
                f"{times}{stage.samples:,}{'' if stage.samples_known else ' (assumed)'}",
                f"{stage.flops / 1e15:,.1f}",
                "" if stage.seconds is None else str(timedelta(seconds=round(stage.seconds))),
            )
        )
    table("stages", rows, header=True)
    for stage in stages:
        print(f"{stage.forecast.stage}: {stage.forecast.text()}")
        if every := stage.forecast.checkpoint_every:
            again = recomputed_layers(assumed["layers"], every)
            print(f"  groups of {every} layers: {again} of {assumed['layers']} layers are run again in backward")
        if stage.fits is False:
            print(f"  does not fit. Change, in this order: {'; '.join(stage.change) or 'the device, or the model'}")
        elif stage.largest:
            most = ", ".join(f"{name}={value}" for name, value in stage.largest.items())
            kept = "" if stage.largest_kept is None else f" ({stage.largest_kept} with nothing recomputed)"
            print(f"  largest that fits, each by itself: {most}{kept}")
    rate = assumed["flops_per_second"]
    reached = "no rate is known: --flops states one" if rate is None else f"{rate / 1e12:,.3g} TFLOP/s are reached"
    print(
        f"Assumed: {assumed['text']} tokens of text and {assumed['image']} of an image in a prompt, {assumed['response']} in a "
        f"response; {reached}. Decoding is bound by memory, too: its time is the least."
    )
