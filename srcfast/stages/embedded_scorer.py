"""Train the embedded R-Scorer on the world's own split of scenes and easy-VQA's training questions.

    python -m srcfast.stages.embedded_scorer --output srcfast/world/assets/scorer

It starts from the embedded base's decoder, which has learnt to reason over facts given as text, and learns in two steps:
to say, token by token and sentence by sentence, whether what a rationale claims is true; then to
give verdicts on true rationales against corrupted ones. Verdicts alone, one label for sixty tokens, take far longer to
teach a model of this size to look things up in the facts.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from srcfast.data.corruptions import Parts
from srcfast.data.easy_vqa import read_easy_vqa
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.rationale_format import ParsedResponse, format_response, parse_response
from srcfast.data.records import Sample
from srcfast.models import load_lvlm
from srcfast.models.scorer import Scorer, load_scorer
from srcfast.models.text_model import save_text_model
from srcfast.runtime.training import Loss, TrainingItem, TrainingSettings, train
from srcfast.stages.scorer_training import Rap, corrupted_variants, evaluate_scorer, scorer_examples, train_scorer
from srcfast.stages.scoring import sample_reference
from srcfast.world.checkpoints import decoder_as_text_model
from srcfast.world.oracle import judge_sample
from srcfast.world.questions import ask
from srcfast.world.rationales import facts, true_rationale
from srcfast.world.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, sample_scenes

VOCABULARY = {
    "color": COLORS,
    "shape": SHAPES,
    "shapes": ("circles", "rectangles", "triangles", "stars", "crosses"),
    "size": SIZES,
    "place": PLACES,
    "background": BACKGROUNDS,
    "number": tuple("012345"),
    "relation": ("left of", "right of", "above", "below"),
    "side": ("leftmost", "rightmost", "topmost", "bottommost"),
    "quantity": ("all", "not all"),
    "answer": ("yes", "no"),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the embedded R-Scorer."""

    seed: int = 0
    samples: int = 7_000
    easy_vqa_samples: int = 1_500
    held_out_samples: int = 600
    claim_epochs: int = 1
    claim_learning_rate: float = 1.2e-3
    verdict_samples: int = 4_500
    verdict_learning_rate: float = 5e-4


def world_raps(count: int, seed: int, split: str = "scorer") -> list[Rap]:
    """True rationale-answer pairs of the world, text alone: (sample, seen, concluded, answer)."""
    rng = random.Random(f"raps/{seed}")
    raps: list[Rap] = []
    for scene in sample_scenes(split, count // 2, seed):
        for question in ask(scene, rng, n=2):
            see, think = true_rationale(scene, question)
            sample = Sample(
                id=f"{split}-{len(raps)}",
                images=(),
                question=question.text,
                answer=question.answer,
                facts=facts(scene),
                extra={"program": question.program, "scene": scene.to_json()},
            )
            raps.append((sample, see, think, question.answer))
    return raps


def easy_vqa_raps(count: int, seed: int) -> tuple[list[Rap], list[Rap]]:
    """The same of easy-VQA's training questions: for training, and those of held-out images (one in ten)."""
    training: list[Rap] = []
    held_out: list[Rap] = []
    for sample in read_easy_vqa("train", limit=count, seed=seed):
        if sample.rationale:
            side = held_out if int(Path(sample.images[0]).stem) % 10 == 0 else training
            side.append((sample, sample.extra["see"], sample.extra["think"], sample.answer))
    return training, held_out


def is_faulty(sample: Sample, parts: Parts) -> bool:
    """The oracle's word on a corruption."""
    see, think, answer = parts
    judgement = judge_sample(sample, ParsedResponse(tuple(see), tuple(think), answer))
    return judgement is not None and not judgement.aligned


def claim_items(scorer: Scorer, raps: Sequence[Rap], rng: random.Random) -> list[TrainingItem]:
    """Trees reference -> {true and corrupted candidates}, with a word on what was said so far.

    After each token of "There is a ..." it is whether some fact begins so; after each other sentence the oracle's word on
    it; after the answer, whether all is well. `meta` is [3, n]: segment, offset within it, and verdict: 0, the first, for
    true, and the last for false.
    """
    bad = len(scorer.verdict_values) - 1
    items = []
    for sample, see, think, answer in raps:
        truth: Parts = (tuple(see), tuple(think), answer)
        texts = [format_response(*truth, "tagged")]
        texts += [v.text for v in corrupted_variants(sample, truth, 4, rng, VOCABULARY, "tagged", is_faulty)]
        segments = [Segment(scorer.encode(sample_reference(sample)))]
        known = {
            tuple(tokens[:n])
            for fact in sample.facts
            for tokens in [scorer.encode(fact)]
            for n in range(len(tokens) + 1)
        }
        slots: list[tuple[int, int, int]] = []
        for text in texts:
            judgement = judge_sample(sample, parse_response(text))
            assert judgement is not None
            shown = f"First: {text}\n"
            tokens, place = scorer.encode(shown), 0
            for sentence, _, verdict in judgement.claims:
                place = shown.index(sentence, place) + len(sentence)
                end = len(scorer.encode(shown[:place])) - 1
                if sentence.startswith("There is a"):
                    own = scorer.encode(sentence)
                    begin = end + 1 - len(own)
                    slots += [
                        (len(segments), begin + n, 0 if tuple(own[: n + 1]) in known else bad)
                        for n in range(3, len(own) - 1)
                    ]
                slots.append((len(segments), end, bad if verdict == "false" else 0))
            slots.append((len(segments), len(tokens) - 1, 0 if judgement.aligned else bad))
            segments.append(Segment(tokens, 0))
        items.append(TrainingItem(Tree(tuple(segments), key=sample.id), np.array(slots).T))
    return items


def claim_loss(scorer: Scorer) -> Loss:
    """Cross entropy over the verdict tokens after each sentence."""

    def loss(
        hidden: Tensor, forest: Forest, head: Tensor, inside: Sequence[TrainingItem], total: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = [
            np.array(starts)[item.meta[0]] + item.meta[1]
            for starts, item in zip(forest.segment_start, inside, strict=True)
        ]
        targets = torch.from_numpy(np.concatenate([item.meta[2] for item in inside]))  # [n]
        logits = hidden[torch.from_numpy(np.concatenate(rows))].float() @ head[scorer.verdict_token_ids].float().T
        hits = (logits.argmax(-1) == targets).sum()
        return F.cross_entropy(logits, targets, reduction="sum") / total, {"accuracy": hits / total}

    return loss


def settings(epochs: int, learning_rate: float, micro_batch_size: int, seed: int) -> TrainingSettings:
    """Of either stage."""
    return TrainingSettings(
        epochs=epochs,
        micro_batch_size=micro_batch_size,
        token_budget=32_768,
        learning_rate=learning_rate,
        warmup_ratio=0.1,
        weight_decay=0.02,
        seed=seed,
    )


def main(
    output: Annotated[Path, typer.Option(help="where the checkpoint goes")],
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train the embedded R-Scorer and write it with the record of how it was made."""
    torch.set_num_threads(threads)
    recipe = Recipe()
    started = time.monotonic()

    def log(metrics: dict[str, float]) -> None:
        if metrics["step"] % 20 == 0:
            kept = {key: round(metrics[key], 4) for key in ("step", "loss", "accuracy") if key in metrics}
            print(f"{kept} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    rng = random.Random(f"scorer/{recipe.seed}")
    easy, easy_held_out = easy_vqa_raps(recipe.easy_vqa_samples, recipe.seed)
    raps = world_raps(recipe.samples, recipe.seed) + easy
    decoder_as_text_model(load_lvlm("embedded"), output)
    scorer = load_scorer(output)
    scorer.requires_grad_(True)
    held_out = world_raps(recipe.held_out_samples, recipe.seed + 1, split="validation")
    with torch.autocast("cpu", dtype=torch.bfloat16):  # three times fp32's GEMM rate where the CPU has bf16
        train(
            scorer.text_model,
            claim_items(scorer, raps, rng),
            loss=claim_loss(scorer),
            denominator=lambda batch: sum(item.meta.shape[1] for item in batch),
            settings=settings(recipe.claim_epochs, recipe.claim_learning_rate, 40, recipe.seed),
            on_step=log,
        )
        some = rng.sample(raps, recipe.verdict_samples)
        examples = scorer_examples(some, rng, VOCABULARY, variants=3, is_faulty=is_faulty)
        train_scorer(
            scorer,
            examples,
            settings(1, recipe.verdict_learning_rate, 64, recipe.seed),
            on_step=log,
        )
    save_text_model(scorer.text_model.to(torch.bfloat16), output)
    shipped = load_scorer(output)
    scores = {
        "world": evaluate_scorer(shipped, scorer_examples(held_out, rng, VOCABULARY, is_faulty=is_faulty)),
        "easy_vqa": evaluate_scorer(shipped, scorer_examples(easy_held_out, rng, VOCABULARY, is_faulty=is_faulty)),
    }
    record = {
        "command": "python -m srcfast.stages.embedded_scorer --output srcfast/world/assets/scorer",
        "recipe": asdict(recipe),
        "held_out": scores,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - started),
    }
    (output / "TRAINING.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(scores, indent=2), file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
