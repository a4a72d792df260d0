"""First contact, DPO steps of a 7B LLaVA-1.5: time, MFU, top kernels, and memory against its forecast.

A pair is a tree of 1,024 tokens: 640 of prompt, 576 of them an image's, and two responses of 192. A step is one forest. The
reference's log-probabilities come from the same model in larger forests, so the first step's drift shows what packing does.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import torch
from PIL import Image

from srcfast.config.load import load_config
from srcfast.config.settings import DPOConfig, TrainingConfig
from srcfast.data.forest import Forest
from srcfast.data.records import Preference
from srcfast.memory.activations import ForestSizes
from srcfast.memory.model_sizes import memory_of
from srcfast.memory.plan import forecast_stage
from srcfast.models import ImageFeatures
from srcfast.models.lvlm import LVLM
from srcfast.stages.dpo import pair_denominator, preference_items, preference_loss
from srcfast.stages.drift import rounding_bound
from srcfast.stages.logprobs import reference_logprobs
from srcfast.stages.pair_trees import pair_logit_rows, preference_trees
from srcfast.stages.prompts import image_loader
from srcfast.training.items import Objective
from srcfast.training.loop import train
from srcfast_benchmarks.contact_model import Models, free
from srcfast_benchmarks.contact_part import Case, Cases
from srcfast_benchmarks.contact_profile import GIB, LastStep, peaks
from srcfast_benchmarks.contact_results import Context
from srcfast_benchmarks.random_models import write_records

WARM_UP, TIMED = 1, 3  # steps; one more is profiled
RESPONSE = {"full": 192, "tiny": 16}  # tokens, the end token among them
TREE = {"full": 1024, "tiny": 96}


def cases(context: Context) -> Cases:
    """Every model with all of its forests, the most telling first."""
    if context.tiny:
        plan = [("nf4", 4, (96, 192)), ("none", 8, (96,))]
    else:
        sizes = (4096, 8192, 16384, 1024)
        plan = [("nf4", 16, sizes), ("none", 16, sizes), ("none", 128, sizes), ("nf4", 128, sizes)]
    models = Models(context)
    return {
        f"{quantize}, r={r}, {tokens} tokens": partial(dpo_steps, models, quantize, r, tokens)
        for quantize, r, sizes in plan
        for tokens in sizes
    }


def dpo_steps(models: Models, quantize: str, r: int, tokens: int, case: Case) -> dict[str, Any]:
    """The reference pass, the forecast, the steps, and a profile of the last step."""
    model, tree = models.lvlm(quantize, r), TREE[case.context.shapes]
    trees = tokens // tree
    pairs = pairs_of(model, models, case.context, trees * (WARM_UP + TIMED + 1), tree)
    features = ImageFeatures(model, image_loader(pairs))
    free()
    times = [now()]
    pairs = reference_logprobs(
        model,
        pairs,
        reference_hash="first contact",
        token_budget=2 * tokens,
        features=features,
        on_forest=lambda _: times.append(now()),
    )
    forecast = forecast_of(models, quantize, r, pairs, trees, model)
    intervals = [end - begin for begin, end in zip(times, times[1:], strict=False)]
    case.store(reference_ms_a_forest=1000 * median(intervals), forecast=forecast)
    settings = TrainingConfig(
        micro_batch_size=trees,
        token_budget=tokens,
        learning_rate=1e-05,
        warmup_ratio=0.0,
        activation_checkpointing=forecast["checkpoint_every"],
        gradient_accumulation_steps=1,
    )
    rows: list[dict[str, Any]] = []
    last = LastStep()

    def on_step(metrics: dict[str, Any]) -> None:
        rows.append(metrics)
        case.store(first_step=rows[0], most_drift=rounding_bound(model.decoder.head_weight.dtype, 1), steps=len(rows))

    free()
    train(  # not `train_preference`, whose check of the first step would end a case that drifts
        model,
        preference_items(model, pairs),
        objective=Objective(preference_loss(DPOConfig(sft_weight=0.0)), pair_denominator, pair_logit_rows),
        settings=settings,
        features=features,
        on_step=on_step,
        profiler=last,  # type: ignore[arg-type]
    )
    taken = peaks()
    timed = rows[WARM_UP : WARM_UP + TIMED]
    seconds = median(row["tokens"] / row["tokens_per_second"] for row in timed)
    return taken | {
        "tokens": timed[0]["tokens"],
        "ms_a_step": 1000 * seconds,
        "tokens_per_second": timed[0]["tokens"] / seconds,
        "pairs_per_second": trees / seconds,
        "mfu": median(row["mfu"] for row in timed),
        "losses": [row["loss"] for row in rows],
        "allocated_over_forecast": taken["peak_allocated_gib"] / forecast["peak_gib"],
        "reserved_over_allocated": taken["peak_reserved_gib"] / taken["peak_allocated_gib"],
        "profile": last.summary,
    }


def forecast_of(
    models: Models, quantize: str, r: int, pairs: list[Preference], trees: int, model: LVLM
) -> dict[str, Any]:
    """What `srcfast estimate` says of a step on a forest of `trees` pairs."""
    dpo = f"dpo={{micro_batch_size: {trees}, gradient_accumulation_steps: 1}}"
    config = load_config(None, [*models.words(quantize, r), dpo])
    forest = ForestSizes.of(Forest.of(preference_trees(model, pairs[:trees])), "cuda")
    forecast = forecast_stage(config, "dpo", memory=memory_of("cuda"), forest=forest, images=len(pairs))
    parts = {name: value / GIB for name, value in forecast.parts.items()}
    return {"peak_gib": forecast.peak / GIB, "checkpoint_every": forecast.checkpoint_every, "parts_gib": parts}


def pairs_of(model: LVLM, models: Models, context: Context, count: int, tree: int) -> list[Preference]:
    """Pairs whose trees have `tree` tokens, or a few less where two responses begin alike."""
    response, side = RESPONSE[context.shapes], models.shape.image_size
    word = len(model.tokenizer("a", add_special_tokens=False).input_ids)
    frame = (
        len(model.encode_prompt("a", [Image.new("RGB", (side, side))])) - word
    )  # the image's tokens and the template's
    words = tree - 2 * response - frame
    _, pairs = write_records(
        context.work / f"pairs-{count}",
        model.tokenizer,
        count,
        image_side=side,
        prompt_words=(words, words),
        response_words=(response - 1, response - 1),
    )
    return pairs


def now() -> float:
    """The clock once the device has done all that was asked of it, in seconds."""
    torch.cuda.synchronize()
    return time.perf_counter()
