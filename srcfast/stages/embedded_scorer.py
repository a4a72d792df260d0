"""Train the embedded R-Scorer on the world's own split of scenes and easy-VQA's training questions.

    python -m srcfast.stages.embedded_scorer --output srcfast/world/assets/scorer

It starts from the embedded base's decoder, which has learnt to reason over facts given as text, and learns in two stages.
Drills: facts, and under them single claims, true or false, said to be so token by token. Lessons: judge trees of true
rationales and their corruptions, with the verdicts and, all along the candidates, a word on each claim. Verdicts alone, one
label for sixty tokens, take far longer to teach a model of this size to look things up in the facts. A corruption counts
as a fault only if the oracle finds it faulty.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from srcfast.data.corruptions import Parts
from srcfast.data.easy_vqa import read_easy_vqa
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.rationale_format import ParsedResponse, parse_response
from srcfast.data.records import Sample
from srcfast.models import load_lvlm
from srcfast.models.scorer import ALONE, Scorer, load_scorer
from srcfast.models.text_model import save_text_model
from srcfast.runtime.training import Loss, TrainingItem, TrainingSettings, train
from srcfast.stages.scorer_training import Rap, evaluate_scorer, judge_tree_of, scorer_examples, target_verdict
from srcfast.world.checkpoints import decoder_as_text_model
from srcfast.world.claims import VOCABULARY, draw_claims
from srcfast.world.oracle import judge_sample
from srcfast.world.questions import ask
from srcfast.world.rationales import facts, true_rationale
from srcfast.world.scenes import Scene, sample_scenes

VERDICT_WEIGHT = 5.0


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the embedded R-Scorer, but for the embedded base that it starts from."""

    seed: int = 0
    drill_scenes: int = 12_000
    drill_claims: int = 14
    drill_epochs: int = 3
    drills_per_step: int = 24
    drill_learning_rate: float = 1.5e-3
    samples: int = 5_400
    easy_vqa_samples: int = 900
    held_out_samples: int = 300
    variants: int = 3
    epochs: int = 1
    trees_per_step: int = 16
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
    for example in examples:
        judged = judge_tree_of(scorer, example)
        sample, texts = samples[example.key], [variant.text for variant in example.variants]
        pairs = list(zip(judged.first.tolist(), judged.second.tolist(), judged.slots.tolist(), strict=True))
        segment_of = {first: judged.tree.segments[slot].parent for first, _, slot in pairs}
        places = [
            place
            for first, segment in segment_of.items()
            for place in claims(scorer, sample, segment, f"First: {texts[first]}\n")
        ]
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


def drill_items(scorer: Scorer, scenes: Sequence[Scene], count: int, rng: random.Random) -> list[TrainingItem]:
    """Trees of a scene's facts with `count` claims below, as a judge tree begins."""
    items = []
    for scene in scenes:
        known = facts(scene)
        segments = [Segment(scorer.encode(f"Facts: {' '.join(known)}\n"))]
        places = []
        for sentence, truth in draw_claims(scene, rng, count).items():
            own = scorer.encode(sentence)
            places += claim_places(scorer, known, len(segments), 0, own, sentence, truth)
            segments.append(Segment(own, 0))
        segment, offset, target = np.array(places).T
        lesson = Lesson(segment, offset, target, np.zeros(len(places), dtype=bool))
        items.append(TrainingItem(Tree(tuple(segments)), lesson))
    return items


def claim_places(
    scorer: Scorer, known: Sequence[str], segment: int, begin: int, own: np.ndarray, sentence: str, truth: bool
) -> list[tuple[int, int, int]]:
    """(segment, offset, verdict) of one claim whose tokens `own` [n] begin at `begin`.

    After its last token it is whether the claim is true, after each token of "There is a ..." whether some fact begins so.
    """
    bad = len(scorer.verdict_values) - 1
    places = []
    if sentence.startswith("There is a"):
        starts = {tuple(fact[:n]) for fact in map(scorer.encode, known) for n in range(len(fact) + 1)}
        places = [(segment, begin + n, 0 if tuple(own[: n + 1]) in starts else bad) for n in range(3, len(own) - 1)]
    return [*places, (segment, begin + len(own) - 1, 0 if truth else bad)]


def claims(scorer: Scorer, sample: Sample, segment: int, shown: str) -> list[tuple[int, int, int]]:
    """(segment, offset, verdict) of all that a candidate claims; after its answer, whether all is well."""
    bad = len(scorer.verdict_values) - 1
    judgement = judge_sample(sample, parse_response(shown[shown.index("<see>") : shown.rindex("\n")]))
    assert judgement is not None
    places = []
    at = 0
    for sentence, _, verdict in judgement.claims:
        at = shown.index(sentence, at) + len(sentence)
        own = scorer.encode(sentence)
        begin = len(scorer.encode(shown[:at])) - len(own)
        places += claim_places(scorer, sample.facts, segment, begin, own, sentence, verdict != "false")
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
            counts = {name: metrics[name] for name in ("verdicts", "claims") if metrics[name]}
            shares = {name: round(metrics[f"right_{name}"] / count, 3) for name, count in counts.items()}
            line = f"step {metrics['step']} loss {metrics['loss']:.4f} right {shares}"
            print(f"{line} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    rng = random.Random(f"scorer/{recipe.seed}")
    decoder_as_text_model(load_lvlm("embedded"), output)
    scorer = load_scorer(output)
    scorer.requires_grad_(True)

    def teach(items: list[TrainingItem], **settings: Any) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):  # three times fp32's GEMM rate where the CPU has bf16
            train(
                scorer.text_model,
                items,
                loss=lesson_loss(scorer),
                denominator=lesson_weight,
                settings=TrainingSettings(**settings, warmup_ratio=0.05, weight_decay=0.02, seed=recipe.seed),
                on_step=log,
            )

    scenes = sample_scenes("scorer", recipe.drill_scenes, recipe.seed + 2)
    teach(
        drill_items(scorer, scenes, recipe.drill_claims, rng),
        epochs=recipe.drill_epochs,
        micro_batch_size=recipe.drills_per_step,
        learning_rate=recipe.drill_learning_rate,
    )
    save_text_model(scorer.text_model, output)  # kept should the lessons be stopped
    easy, easy_held_out = easy_vqa_raps(recipe.easy_vqa_samples, recipe.seed)
    raps = world_raps(recipe.samples, recipe.seed) + easy
    held_out = world_raps(recipe.held_out_samples, recipe.seed + 1, split="validation")
    teach(
        lesson_items(scorer, raps, recipe.variants, rng),
        epochs=recipe.epochs,
        micro_batch_size=recipe.trees_per_step,
        token_budget=32_768,
        learning_rate=recipe.learning_rate,
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
