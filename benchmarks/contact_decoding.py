"""First contact, beam search of 4 samples by 24 rows: ms a step with and without CUDA graphs, and memory after each piece.

The candidates' stage runs in pieces, and no memory of one piece may be held during the next: two pieces run in a row through
the code of the stage. In the `full rows` cases no row ends before its limit: all 96 rows take every step, so that steps can be
counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from srcfast.config.load import load_config
from srcfast.config.settings import Config
from srcfast.data.records import Sample
from srcfast.memory.flops import decode_flops, peak_flops
from srcfast.memory.model_sizes import ModelSizes, memory_of
from srcfast.memory.plan import Lengths, forecast_stage
from srcfast.models import ImageFeatures
from srcfast.models.lvlm import LVLM
from srcfast.run.chunks import Chunks
from srcfast.run.progress import track
from srcfast.stages import candidates
from srcfast.stages.candidates import prompts_of
from srcfast.stages.prompts import image_loader
from srcfast_benchmarks.contact_model import Models, free
from srcfast_benchmarks.contact_part import Case, Cases
from srcfast_benchmarks.contact_profile import GIB, memory, peaks
from srcfast_benchmarks.contact_results import Context
from srcfast_benchmarks.contact_training import now
from srcfast_benchmarks.random_models import bias_head, write_records

SAMPLES, RANK = 4, 16
NEVER = 1e-12  # chance of a token that no row is to draw
ENDINGS = {"full rows": (NEVER, NEVER), "sentences": (1 / 160, 1 / 20)}  # chances of the end token and of a full stop
# Bytes a second that a device's memory moves, by data sheet. All words of a key have to occur in the device's name.
BANDWIDTHS = {"H200": 4.8e12, "H100 PCIe": 2.0e12, "H100": 3.35e12, "GH200": 4.0e12}
NF4_BYTES = 4.127 / 8  # of a weight


@dataclass(frozen=True)
class Search:
    """Sizes of the search: its rows a sample are beams times proposals."""

    beams: int
    proposals: int
    sentence_tokens: int
    new_tokens: int

    @property
    def rows(self) -> int:
        return SAMPLES * self.beams * self.proposals


FULL, TINY = Search(8, 3, 64, 192), Search(2, 2, 4, 8)


def search_of(context: Context) -> Search:
    return TINY if context.tiny else FULL


def cases(context: Context) -> Cases:
    models = Models(context)
    plan = [
        ("none", True, "full rows"),
        ("none", False, "full rows"),
        ("none", True, "sentences"),
        ("nf4", True, "full rows"),
        ("nf4", False, "full rows"),
    ]
    return {
        f"{quantize}, {'graphs' if graphs else 'no graphs'}, {ending}": partial(
            beam_search, models, quantize, graphs, ending
        )
        for quantize, graphs, ending in (plan[:3] if context.tiny else plan)
    }


def beam_search(models: Models, quantize: str, graphs: bool, ending: str, case: Case) -> dict[str, Any]:
    """Two pieces in a row, as the stage runs them."""
    search, model = search_of(case.context), models.lvlm(quantize, RANK)
    set_endings(model, models, *ENDINGS[ending])
    samples = samples_of(model, models, case.context)
    prompt = max(len(one.token_ids) for one in prompts_of(model, samples))
    config = config_of(models, quantize, search)
    side = models.shape.image_size
    forecast = forecast_stage(
        config,
        "candidates",
        memory=memory_of("cuda"),
        lengths=Lengths(text=prompt - model.vision.num_tokens(Image.new("RGB", (side, side)))),
        images=len(samples),
    )
    case.store(forecast_gib=forecast.peak / GIB, parts_gib={name: size / GIB for name, size in forecast.parts.items()})
    free()
    before = memory()
    torch.cuda.reset_peak_memory_stats()
    features = Watched(model, image_loader(samples), lambda marks: case.store(marks=marks))
    with one_batch_a_piece(), track("candidates", len(samples), quiet=True) as progress:
        parts = candidates.candidates_in_chunks(
            Chunks(case.context.work / f"pieces-{case.name}", dict, progress),
            model,
            samples,
            config.candidates.replace(batch_size=SAMPLES, cuda_graphs=graphs),
            features=features,
            seed=0,
        )
    taken, marks = peaks(), features.marks  # before the first piece, after the first, at the stage's end
    seconds = [end["at"] - begin["at"] for begin, end in zip(marks, marks[1:], strict=False)]
    values: dict[str, Any] = taken | {
        "before": before,
        "seconds_a_piece": seconds,
        "tokens_per_second": progress.tokens / sum(seconds),
        "candidates": sum(1 for _ in parts.rows()),
        "allocated_over_forecast": taken["peak_allocated_gib"] / (forecast.peak / GIB),
        "left_gib": marks[2]["allocated_gib"] - before["allocated_gib"],
        "second_over_first_gib": marks[2]["allocated_gib"] - marks[1]["allocated_gib"],
    }
    if ending == "full rows":
        steps = search.new_tokens - 1  # the first token is drawn from the prompt's logits
        least = least_seconds(model, search, prompt)
        values |= {"steps_a_piece": steps, "ms_a_step": 1000 * seconds[1] / steps}
        values |= {"least_ms_a_step": None if least is None else 1000 * least}
    return values


def least_seconds(model: LVLM, search: Search, prompt: int) -> float | None:
    """Least time of a step: reading weights and cache once, or the products. None for a device of unknown bandwidth."""
    words = set(torch.cuda.get_device_name().split())
    bandwidth = next((rate for key, rate in BANDWIDTHS.items() if set(key.split()) <= words), None)
    if bandwidth is None:
        return None
    sizes = ModelSizes.of(model)
    width, shapes, mean = sizes.dtype_bytes, sizes.shapes, search.new_tokens / 2  # tokens of a row, over all steps
    cache = 2 * shapes.layers * shapes.key * width * (SAMPLES * prompt + search.rows * mean)
    linears = shapes.linear_weights * (NF4_BYTES if sizes.quantised else width)
    moved = linears + shapes.vocabulary * shapes.hidden * width + cache
    flops = decode_flops(shapes, search.rows, search.rows * (prompt + mean))
    return max(moved / bandwidth, flops / peak_flops("cuda", torch.bfloat16))


def set_endings(model: LVLM, models: Models, end: float, stop: float) -> None:
    """Set the chances that a token is the end token, or a full stop."""
    bias_head(
        model.decoder.head_weight, model.tokenizer, replace(models.shape, end_probability=end, stop_probability=stop)
    )


def config_of(models: Models, quantize: str, search: Search) -> Config:
    candidates = (
        f"candidates={{batch_size: {SAMPLES}, num_beams: {search.beams}, proposals: {search.proposals}, max_sentences: 64, "
        f"max_sentence_tokens: {search.sentence_tokens}, max_new_tokens: {search.new_tokens}}}"
    )
    return load_config(None, [*models.words(quantize, RANK), candidates])


class Watched(ImageFeatures):
    """Image features that note clock and memory whenever the stage drops them, which it does before each piece."""

    def __init__(
        self, model: LVLM, load: Callable[[str], Image.Image], store: Callable[[list[dict[str, float]]], None]
    ):
        super().__init__(model, load)
        self.marks: list[dict[str, float]] = []
        self.store = store

    def mark(self) -> None:
        self.marks.append({"at": now()} | memory())
        self.store(self.marks)

    def clear(self) -> None:
        super().clear()
        self.mark()


@contextmanager
def one_batch_a_piece() -> Iterator[None]:
    """Let a piece of the stage be one batch instead of eight, so that two pieces fit into the time."""
    before, candidates.BATCHES = candidates.BATCHES, 1
    try:
        yield
    finally:
        candidates.BATCHES = before


def samples_of(model: LVLM, models: Models, context: Context) -> list[Sample]:
    """Samples of two pieces."""
    words = 6 if context.tiny else 50
    samples, _ = write_records(
        context.work / "samples",
        model.tokenizer,
        2 * SAMPLES,
        image_side=models.shape.image_size,
        prompt_words=(words, words),
    )
    return samples
