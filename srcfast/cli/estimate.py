"""`srcfast estimate`: forecast a run's memory and time by stage, and advise what to change where memory doesn't suffice."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from srcfast.cli.table import table
from srcfast.config.datasets import DatasetConfig
from srcfast.config.settings import Config, CurationConfig
from srcfast.data.forest import Forest
from srcfast.hub.pins import pinned
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

ASSUMED_SAMPLES = 1000  # of a stage whose number of samples the settings don't give
# By stage the settings whose largest value that fits is reported.
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
    """Forecast of one stage. `seconds` is None if the device's rate is unknown, `fits` if its memory is."""

    forecast: Forecast
    fits: bool | None
    largest: dict[str, int]  # setting -> its largest value that fits, the other settings unchanged
    largest_kept: int | None  # largest token budget of training that fits with nothing recomputed
    samples: int
    samples_known: bool
    times: int  # how often the stage runs
    flops: float  # necessary floating-point operations of all these times
    seconds: float | None
    change: list[str]  # advised changes of settings, cheapest first

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return self.forecast.to_json() | {name: value for name, value in vars(self).items() if name != "forecast"}


def estimate(
    config: Config,
    memory: str | None,
    flops: float | None,
    mfu: float,
    text_tokens: int,
    response_tokens: int,
    as_json: bool,
) -> None:
    """Print the forecast.

    Args:
        config: the run's settings.
        memory: memory of the device, such as `12GiB`; None: the settings' `memory`, or the device's.
        flops: floating-point operations a second that the run reaches; None: `mfu` times the device's peak.
        mfu: share of the device's peak rate that the run reaches; used if `flops` is None.
        text_tokens, response_tokens: of a typical sample.
        as_json: print JSON instead of tables.
    """
    config = pinned(config, None, models=["model", "scorer"], weights=False)
    lengths = Lengths(text_tokens, response_tokens)
    capacity = device_memory(config) if memory is None else float(parse_bytes(memory))
    rate = flops or _device_rate(config, mfu)
    stages = [_estimate_stage(config, stage, capacity, rate, lengths) for stage in STAGES]
    model = policy_sizes(config)
    summary = _summary(config, model, capacity, lengths) | {
        "assumed": asdict(lengths)
        | {"image": 0 if model.vision is None else model.vision.image_tokens, "flops_per_second": rate},
        "stages": [stage.to_json() for stage in stages],
    }
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    _print_model(config, summary, capacity)
    _print_stages(stages, summary["assumed"] | {"layers": model.shapes.layers})


def _device_rate(config: Config, mfu: float) -> float | None:
    """Return `mfu` times the device's peak rate, in FLOP/s; None for a GPU that this machine doesn't have."""
    device = torch.device(config.model.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    return mfu * peak_flops(device, getattr(torch, config.model.dtype))


def _estimate_stage(config: Config, stage: str, capacity: float, rate: float | None, lengths: Lengths) -> StageEstimate:
    forecast = forecast_stage(config, stage, memory=capacity, lengths=lengths)
    largest = partial(largest_value, stage=stage, memory=capacity, lengths=lengths)
    known = math.isfinite(capacity)
    largest_kept = None
    if known and stage in TRAINING:
        without_recomputing = with_setting(config, f"{stage}.activation_checkpointing", 0)
        largest_kept = largest(without_recomputing, f"{stage}.token_budget")
    count = _count(config, stage)
    times = {"rationale": 1, "evaluation": config.iterations + 2}.get(stage, config.iterations)
    necessary = times * (count or ASSUMED_SAMPLES) * sample_flops(config, stage, lengths)
    return StageEstimate(
        forecast=forecast,
        fits=forecast.fits(capacity) if known else None,
        largest={name: largest(config, name) for name in LARGEST[stage]} if known else {},
        largest_kept=largest_kept,
        samples=count or ASSUMED_SAMPLES,
        samples_known=bool(count),
        times=times,
        flops=necessary,
        seconds=None if rate is None else necessary / rate,
        change=[str(change) for change in advice(config, stage, memory=capacity, lengths=lengths)] if known else [],
    )


def _count(config: Config, stage: str) -> int:
    """Count a stage's samples from the settings; 0 where they don't say."""
    if stage == "evaluation":
        return _known(config.data.evaluation)
    use = "rationale" if stage == "rationale" else "calibration"
    count = config.rationale.samples if stage == "rationale" else config.candidates.samples
    count = count or _known([dataset for dataset in config.data.train if use in dataset.use])
    return count * (_pairs_of_sample(config.curation) if stage in ("preferences", "dpo") else 1)


def _pairs_of_sample(curation: CurationConfig) -> int:
    """Return the maximum number of pairs of a sample, those that are derived from others included."""
    judged = curation.pairs_per_sample
    chosen = judged if curation.pair_choice == "disjoint" else 1
    return judged * (2 if curation.rationale_pairs else 1) + chosen * curation.left_out_negatives


def _known(datasets: Sequence[DatasetConfig]) -> int:
    """Sum the datasets' limits; 0 if one of them has no limit, since its size is unknown until it is read."""
    limits = [dataset.limit for dataset in datasets]
    return sum(limits) if all(limits) else 0


def sample_flops(config: Config, stage: str, lengths: Lengths) -> float:
    """Count the necessary FLOPs of one sample in a stage: in training over all epochs, in decoding with all beams."""
    tree = typical_tree(config, stage, lengths)
    model = scorer_sizes(config) if stage == "scores" else policy_sizes(config)
    # Sizes for a GPU: they hold every count that FLOPs depend on, whatever device the run uses.
    sizes = ForestSizes.of(Forest.of([tree]), "cuda")
    adapter = 0 if model.lora is None else model.lora.parameters
    if stage in TRAINING:
        section = config.rationale if stage == "rationale" else config.dpo
        passes = training_flops(model.shapes, sizes.tokens, sizes.attended, sizes.head_rows, adapter)
        items = section.updates * section.global_batch_size  # that are run, where their number is set
        count = _count(config, stage)
        return (items / count if items and count else section.epochs) * passes + _image_flops(model)
    if stage in DECODING:
        search = config.candidates if stage == "candidates" else None
        rows = 1 if search is None else search.width + search.plain_samples
        prompts = 1 if search is None else 1 + math.ceil(search.plain_samples / search.width)
        attended = rows * attended_of(tree.num_tokens, lengths.response)
        prompt = prompts * forward_flops(model.shapes, sizes.tokens, sizes.attended, 1, adapter) + _image_flops(model)
        return prompt + decode_flops(model.shapes, rows * lengths.response, attended, adapter)
    head_rows = 0 if stage == "scores" else sizes.head_rows
    return forward_flops(model.shapes, sizes.tokens, sizes.attended, head_rows, adapter) + _image_flops(model)


def _image_flops(model: ModelSizes) -> float:
    if model.vision is None:
        return 0.0
    weights = model.parameters.get("vision", 0) + model.parameters.get("projector", 0)
    return 2.0 * weights * model.vision.patches


# Output -----------------------------------------------------------------------------------------------------


def _summary(config: Config, model: ModelSizes, capacity: float, lengths: Lengths) -> dict[str, Any]:
    """Collect the model's sizes, which don't depend on the stage."""
    adapter = 0 if model.lora is None else model.lora.parameters
    pair = ForestSizes.of(Forest.of([typical_tree(config, "dpo", lengths)]), model.device_type)
    casts = activation_bytes(model, pair.times(0)).peak  # of the adapter: they don't depend on tokens
    weights = model.weight_bytes + model.quantisation_bytes
    moments = moment_bytes(config.dpo.optimizer, adapter, model.device_type)
    known = math.isfinite(capacity)
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
        "activation_bytes_per_token": (activation_bytes(model, pair).peak - casts) / pair.tokens,
        "kv_bytes_per_token": 2 * model.shapes.attention_layers * model.shapes.key * model.dtype_bytes,
        "state_bytes_per_row": model.state_bytes,
        "memory": capacity if known else None,
        "largest_token_budget": largest_value(config, "dpo.token_budget", "dpo", memory=capacity, lengths=lengths)
        if known
        else None,
    }


def _print_model(config: Config, summary: dict[str, Any], capacity: float) -> None:
    ranks = sharing_ranks(config)
    shared = f", layers sharded across {ranks} ranks" if ranks > 1 else ""
    rows = [(f"parameters: {part}", f"{count:,}") for part, count in summary["parameters"].items()]
    rows += [
        ("parameters", f"{summary['total_parameters']:,}"),
        ("adapter's parameters", f"{summary['adapter_parameters']:,}"),
        (
            f"weights ({config.model.dtype}, quantize {config.model.quantize}{shared})",
            show_bytes(summary["weight_bytes"]),
        ),
        ("  of which scales of 4-bit weights", show_bytes(summary["quantisation_bytes"])),
        ("adapter", show_bytes(summary["adapter_bytes"])),
        ("gradients and optimizer", show_bytes(summary["optimizer_bytes"])),
        ("activations per token in training", show_bytes(summary["activation_bytes_per_token"])),
        ("keys and values per token in decoding", show_bytes(summary["kv_bytes_per_token"])),
    ]
    if model_states := summary["state_bytes_per_row"]:
        rows.append(("recurrent states per row in decoding", show_bytes(model_states)))
    if math.isfinite(capacity):
        rows.append(
            (f"largest token budget of DPO in {show_bytes(capacity)}", f"{summary['largest_token_budget']:,} tokens")
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
        if group_size := stage.forecast.checkpoint_every:
            recomputed = recomputed_layers(assumed["layers"], group_size)
            print(
                f"  groups of {group_size} layers: {recomputed} of {assumed['layers']} layers are recomputed in backward"
            )
        if stage.fits is False:
            print(f"  does not fit. Change, in this order: {'; '.join(stage.change) or 'the device, or the model'}")
        elif stage.largest:
            largest = ", ".join(f"{name}={value}" for name, value in stage.largest.items())
            without = "" if stage.largest_kept is None else f" ({stage.largest_kept} with nothing recomputed)"
            print(f"  largest values that fit, one changed at a time: {largest}{without}")
    rate = assumed["flops_per_second"]
    speed = "unknown speed (--flops sets it)" if rate is None else f"{rate / 1e12:,.3g} TFLOP/s"
    print(
        f"Assumed: {assumed['text']} tokens of text and {assumed['image']} of an image in a prompt, {assumed['response']} in a "
        f"response; {speed}. Decoding is also bound by memory bandwidth: its time is a lower bound."
    )
