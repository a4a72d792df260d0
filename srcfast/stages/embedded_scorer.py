"""Train the embedded R-Scorer on the world's own split of scenes and easy-VQA's training questions.

    python -m srcfast.stages.embedded_scorer --output srcfast/world/assets/scorer

It starts from the embedded base's decoder, which has learnt to reason over facts given as text. It learns to give verdicts
on true rationales against corrupted ones, and at the same time to say, token by token and sentence by sentence, whether what
a candidate claims is true (the oracle knows). Verdicts alone, one label for sixty tokens, take far longer to teach a
model of this size to look things up in the facts. A corruption counts as a fault only if the oracle finds it faulty.
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
from srcfast.data.forest import Forest
from srcfast.data.rationale_format import ParsedResponse, parse_response
from srcfast.data.records import Sample
from srcfast.models import load_lvlm
from srcfast.models.scorer import ALONE, Scorer, load_scorer
from srcfast.models.text_model import save_text_model
from srcfast.runtime.training import Loss, TrainingItem, TrainingSettings, train
from srcfast.stages.scorer_training import Rap, evaluate_scorer, judged_examples, scorer_examples, target_verdict
from srcfast.world.checkpoints import decoder_as_text_model
from srcfast.world.oracle import judge_sample
from srcfast.world.questions import ask
from srcfast.world.rationales import facts, true_rationale
from srcfast.world.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, sample_scenes

VERDICT_WEIGHT = 5.0
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
    samples: int = 3_600
    easy_vqa_samples: int = 600
    held_out_samples: int = 300
    variants: int = 3
    epochs: int = 1
    trees_per_step: int = 64
    learning_rate: float = 1e-3


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


@dataclass(frozen=True)
class Lesson:
    """Places of one judge tree where a verdict token is to be said, [n] each.

    `verdict` is True at the verdict slots, False where it is said of what a candidate has claimed so far: 0, the first
    verdict, for true, the last for false.
    """

    segment: np.ndarray
    offset: np.ndarray
    target: np.ndarray
    verdict: np.ndarray


def lesson_items(scorer: Scorer, raps: Sequence[Rap], variants: int, rng: random.Random) -> list[TrainingItem]:
    """Judge trees of true and corrupted candidates, with a word on each claim as well as the verdicts."""
    samples = {sample.id: sample for sample, *_ in raps}
    examples = scorer_examples(raps, rng, VOCABULARY, variants=variants, is_faulty=is_faulty)
    items = []
    for judged, example in judged_examples(scorer, examples):
        sample, texts = samples[example.key], [variant.text for variant in example.variants]
        pairs = list(zip(judged.first.tolist(), judged.second.tolist(), judged.slots.tolist(), strict=True))
        places = claims(scorer, sample, 1, f"First: {texts[judged.first[0]]}\n")
        for _, second, slot in pairs:
            if second != ALONE:
                places += claims(scorer, sample, slot, f"Second: {texts[second]}\nBetter:")
        told = len(places)
        for first, second, slot in pairs:
            verdict = target_verdict(example, first, second, len(scorer.verdict_values))
            places.append((slot, judged.tree.segments[slot].tokens.size - 1, verdict))
        segment, offset, target = np.array(places).T
        items.append(TrainingItem(judged.tree, Lesson(segment, offset, target, np.arange(len(places)) >= told)))
    return items


def claims(scorer: Scorer, sample: Sample, segment: int, shown: str) -> list[tuple[int, int, int]]:
    """(segment, offset, verdict) of what a candidate claims.

    After each token of "There is a ..." it is whether some fact begins so; after each other sentence the oracle's word on
    it; after the answer, whether all is well.
    """
    bad = len(scorer.verdict_values) - 1
    judgement = judge_sample(sample, parse_response(shown[shown.index("<see>") : shown.rindex("\n")]))
    assert judgement is not None
    known = {tuple(tokens[:n]) for tokens in map(scorer.encode, sample.facts) for n in range(len(tokens) + 1)}
    places = []
    at = 0
    for sentence, _, verdict in judgement.claims:
        at = shown.index(sentence, at) + len(sentence)
        end = len(scorer.encode(shown[:at])) - 1
        if sentence.startswith("There is a"):
            own = scorer.encode(sentence)
            begin = end + 1 - len(own)
            places += [(segment, begin + n, 0 if tuple(own[: n + 1]) in known else bad) for n in range(3, len(own) - 1)]
        places.append((segment, end, bad if verdict == "false" else 0))
    end = len(scorer.encode(shown[: shown.rindex("\n")])) - 1
    return [*places, (segment, end, 0 if judgement.aligned else bad)]


def lesson_loss(scorer: Scorer) -> Loss:
    """Cross entropy over the verdict tokens; a verdict counts as much as `VERDICT_WEIGHT` claims."""

    def loss(
        hidden: Tensor, forest: Forest, head: Tensor, inside: Sequence[TrainingItem], total: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        lessons: list[Lesson] = [item.meta for item in inside]
        starts = [np.array(own)[one.segment] for own, one in zip(forest.segment_start, lessons, strict=True)]
        rows = np.concatenate([start + one.offset for start, one in zip(starts, lessons, strict=True)])
        targets = torch.from_numpy(np.concatenate([one.target for one in lessons]))  # [n]
        verdict = torch.from_numpy(np.concatenate([one.verdict for one in lessons]))
        logits = hidden[torch.from_numpy(rows)].float() @ head[scorer.verdict_token_ids].float().T  # [n, K]
        weights = torch.where(verdict, VERDICT_WEIGHT, 1.0)
        right = (logits.argmax(-1) == targets).float()
        metrics = {
            "right_verdicts": right[verdict].sum(),
            "verdicts": verdict.sum(),
            "right_claims": right[~verdict].sum(),
            "claims": (~verdict).sum(),
        }
        return (weights * F.cross_entropy(logits, targets, reduction="none")).sum() / total, metrics

    return loss


def lesson_weight(items: Sequence[TrainingItem]) -> float:
    """The denominator: verdicts by their weight, claims by 1."""
    return float(sum(np.where(item.meta.verdict, VERDICT_WEIGHT, 1.0).sum() for item in items))


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
            shares = {name: round(metrics[f"right_{name}"] / metrics[name], 3) for name in ("verdicts", "claims")}
            line = f"step {metrics['step']} loss {metrics['loss']:.4f} right {shares}"
            print(f"{line} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

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
            lesson_items(scorer, raps, recipe.variants, rng),
            loss=lesson_loss(scorer),
            denominator=lesson_weight,
            settings=TrainingSettings(
                epochs=recipe.epochs,
                micro_batch_size=recipe.trees_per_step,
                token_budget=32_768,
                learning_rate=recipe.learning_rate,
                warmup_ratio=0.05,
                weight_decay=0.02,
                seed=recipe.seed,
            ),
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
