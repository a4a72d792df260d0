"""Candidates of an LVLM: srcfast's decoding against transformers' `generate`, as many samples a prompt, the same model.

Tokens are those drawn for responses under way, the end token included; prompts are on the clock, but are not counted. Every
response ends where the model ends it, or at the limit. The model is random, its end token and full stops as likely as in text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from srcfast.data.jsonl import read_jsonl
from srcfast.data.records import Sample
from srcfast_benchmarks.harness import Shape
from srcfast_benchmarks.random_models import (
    LLAVA_7B,
    SMALL,
    SMALL_QWEN3_VL,
    ModelShape,
    processor_of,
    write_model,
    write_records,
)
from srcfast_benchmarks.stage_harness import StageBenchmark, Watch, main

SHAPES: dict[str, list[Shape]] = {
    "cpu": [
        {"model": "5M", "image_tokens": 64, "prompts": 64, "candidates": 8, "most_tokens": 96, "dtype": "float32"},
    ],
    "cuda": [
        {"model": "7B", "image_tokens": 576, "prompts": 64, "candidates": 8, "most_tokens": 256, "dtype": "bfloat16"},
    ],
}
MODELS: dict[str, ModelShape] = {
    "5M": replace(SMALL, end_probability=1 / 40, stop_probability=1 / 12),
    "Qwen3-VL 6M": replace(SMALL_QWEN3_VL, end_probability=1 / 40, stop_probability=1 / 12),
    "7B": replace(LLAVA_7B, end_probability=1 / 160, stop_probability=1 / 20),
}
ROUNDS = 3  # each with draws of its own; the first, of some prompts, warms up
WARM_UP_PROMPTS = 8
SLOTS = {"sampling": 16, "beam search": 32}  # prompts that srcfast decodes at once


def prepare(shape: Shape, folder: Path, device: str) -> None:
    from transformers import AutoTokenizer

    model = write_model(folder / "model", MODELS[shape["model"]], device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    write_records(folder, tokenizer, shape["prompts"], image_side=MODELS[shape["model"]].image_size, seed=2)


def read_samples(folder: Path) -> list[Sample]:
    file, root = folder / "samples.jsonl", folder / "images"
    return [Sample.from_json(row, file=file, line=line, image_root=root) for line, row in read_jsonl(file)]


def srcfast(shape: Shape, folder: Path, device: str, watch: Watch) -> None:
    """Sentence-level beam search."""
    from srcfast.config.settings import CandidatesConfig
    from srcfast.stages.candidates import generate_candidates

    count, most = shape["candidates"], shape["most_tokens"]
    settings = CandidatesConfig(
        num_candidates=count,
        num_beams=count // 2,
        proposals=2,
        max_new_tokens=most,
        top_p=1.0,
        max_sentences=12,
        max_sentence_tokens=48,
    )

    class Progress:
        tokens = 0

        def advance(self, n: int = 1, tokens: int = 0) -> None:
            self.tokens += tokens

    def write(model: Any, samples: list[Sample], features: Any, seed: int) -> int:
        progress = Progress()
        options = {"features": features, "seed": seed, "batch_size": SLOTS["beam search"], "progress": progress}
        generate_candidates(model, samples, settings, **options)
        return progress.tokens

    _srcfast(shape, folder, device, watch, write)


def srcfast_sampling(shape: Shape, folder: Path, device: str, watch: Watch) -> None:
    """Independent samples, as transformers gives them."""
    from srcfast.generation.generate import sample_responses
    from srcfast.models.lora import folded_lora
    from srcfast.stages.candidates import prompts_of

    def write(model: Any, samples: list[Sample], features: Any, seed: int) -> int:
        run: list[int] = []
        options = {"count": shape["candidates"], "max_new_tokens": shape["most_tokens"], "slots": SLOTS["sampling"]}
        with folded_lora(model):
            sample_responses(
                model,
                prompts_of(model, samples),
                features,
                seed=seed,
                on_done=lambda _, tokens: run.append(tokens),
                **options,
            )
        return sum(run)

    _srcfast(shape, folder, device, watch, write)


def _srcfast(
    shape: Shape,
    folder: Path,
    device: str,
    watch: Watch,
    write: Callable[[Any, list[Sample], Any, int], int],  # -> tokens run, prompts included
) -> None:
    from srcfast.models import ImageFeatures, load_lvlm
    from srcfast.stages.candidates import prompts_of
    from srcfast.stages.prompts import image_loader

    samples = read_samples(folder)
    model = load_lvlm(folder / "model", dtype=getattr(torch, shape["dtype"]), device=device)
    watch.start()
    for number in range(ROUNDS):
        subset = samples if number else samples[:WARM_UP_PROMPTS]
        tokens = write(model, subset, ImageFeatures(model, image_loader(subset)), number)
        with watch.paused():
            drawn = tokens - sum(len(prompt.token_ids) for prompt in prompts_of(model, subset))
        watch.lap(drawn, drawn, samples=len(subset))


def transformers(shape: Shape, folder: Path, device: str, watch: Watch, *, at_once: int = 64) -> None:
    """`generate` on batches of `at_once` prompts, each with all of its candidates."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    samples = read_samples(folder)
    processor = processor_of(folder / "model", padding_side="left")
    tokenizer = processor.tokenizer
    model = AutoModelForImageTextToText.from_pretrained(
        folder / "model", dtype=getattr(torch, shape["dtype"]), device_map=device
    ).eval()
    texts = [_prompt(tokenizer, sample) for sample in samples]
    watch.start()
    for number in range(ROUNDS):
        torch.manual_seed(number)
        drawn, count = 0, len(samples) if number else WARM_UP_PROMPTS
        for start in range(0, count, at_once):
            subset = samples[start : min(start + at_once, count)]
            images = [Image.open(sample.image_root / sample.images[0]) for sample in subset]
            batch = processor(
                images=images,
                text=texts[start : start + len(subset)],
                padding=True,
                return_tensors="pt",
                add_special_tokens=False,
            ).to(device)
            batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
            output = model.generate(
                **batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=shape["candidates"],
                max_new_tokens=shape["most_tokens"],
                pad_token_id=tokenizer.pad_token_id,
            )
            drawn += int((output[:, batch["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())
        watch.lap(drawn, drawn, samples=count)


def _prompt(tokenizer: Any, sample: Sample) -> str:
    content: Sequence[dict[str, str]] = [{"type": "image"}, {"type": "text", "text": sample.question}]
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


BENCHMARK = StageBenchmark(
    name="candidates",
    unit="tokens",
    shapes=SHAPES,
    prepare=prepare,
    implementations={
        "transformers, all prompts at once": transformers,
        "transformers, 8 prompts at once": partial(transformers, at_once=8),
        "srcfast, sampling": srcfast_sampling,
        "srcfast, sentence-level beam search": srcfast,
    },
    headline="srcfast, sentence-level beam search",
)

if __name__ == "__main__":
    main(BENCHMARK)
