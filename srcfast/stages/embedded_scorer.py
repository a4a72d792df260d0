"""Train the embedded R-Scorer on the world's own split of scenes and easy-VQA's training questions.

    python -m srcfast.stages.embedded_scorer --output srcfast/world/assets/scorer

It starts from the embedded base's decoder, which has learnt to reason over facts given as text, and learns in two stages.
First to check: below a sample's reference stand candidates, true ones and corrupted ones, and others made of claims half of
which are false; whether it is true is said of every claim, token by token, and of every whole candidate. Then to compare:
the judge trees themselves, with the verdicts as well. Verdicts alone, one label for sixty tokens, take far longer to teach
a model of this size to look things up in the facts; and where false claims are few, it learns to call all of them true. A
corruption counts as a fault only if the oracle finds it faulty.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
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
from srcfast.models.lora import LoRAConfig, merge_lora
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

CLAIM, WHOLE, VERDICT = range(3)  # what is judged: a claim so far, a candidate at its end, a pair
WEIGHTS = np.array([1.0, 4.0, 5.0])  # in the loss


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the embedded R-Scorer, but for the embedded base that it starts from."""

    seed: int = 0
    lora_r: int = 32
    samples: int = 4_000
    easy_vqa_samples: int = 600
    held_out_samples: int = 300
    variants: int = 3
    drills: int = 5
    claims_per_drill: int = 4
    checking_epochs: int = 2
    checking_learning_rate: float = 2e-3
    comparing_epochs: int = 1
    comparing_learning_rate: float = 1e-3
    trees_per_step: int = 16


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


Place = tuple[int, int, int, int]  # segment, offset within it, verdict, kind (CLAIM, WHOLE or VERDICT)


@dataclass(frozen=True)
class Lesson:
    """Places of one tree where a verdict token is to be said, [n] each.

    Of claims and whole candidates it is the first verdict for right, the last for wrong.
    """

    segment: np.ndarray
    offset: np.ndarray
    target: np.ndarray
    kind: np.ndarray


def lesson(tree: Tree, places: Sequence[Place]) -> TrainingItem:
    """The training item of a tree and its places."""
    return TrainingItem(tree, Lesson(*np.array(places).T))


def checking_items(scorer: Scorer, raps: Sequence[Rap], recipe: Recipe, rng: random.Random) -> list[TrainingItem]:
    """Judge trees without seconds: the reference, and below it candidates and drills (claims of which half are false)."""
    samples = {sample.id: sample for sample, *_ in raps}
    items = []
    for example in scorer_examples(raps, rng, VOCABULARY, variants=recipe.variants, is_faulty=is_faulty):
        sample = samples[example.key]
        scene = Scene.from_json(sample.extra["scene"])
        segments = [Segment(np.concatenate([scorer.opening, scorer.encode(example.reference)]))]
        places: list[Place] = []
        for variant in example.variants:
            shown = f"First: {variant.text}\n"
            places += candidate_places(scorer, sample, len(segments), shown)
            segments.append(Segment(scorer.encode(shown), 0))
        fully_known = all(o.place is not None for o in scene.objects)  # easy-VQA's are not
        for _ in range(recipe.drills if fully_known else 0):
            claims = draw_claims(scene, rng, recipe.claims_per_drill)
            shown = f"First: <see> {' '.join(claims)} </see>\n"
            at = 0
            for sentence, truth in claims.items():
                at = shown.index(sentence, at) + len(sentence)
                places += claim_places(scorer, sample.facts, len(segments), shown[:at], sentence, truth)
            segments.append(Segment(scorer.encode(shown), 0))
        items.append(lesson(Tree(tuple(segments)), places))
    return items


def comparing_items(scorer: Scorer, raps: Sequence[Rap], recipe: Recipe, rng: random.Random) -> list[TrainingItem]:
    """Judge trees of true and corrupted candidates: verdicts, and a word on each claim and candidate."""
    samples = {sample.id: sample for sample, *_ in raps}
    items = []
    for example in scorer_examples(raps, rng, VOCABULARY, variants=recipe.variants, is_faulty=is_faulty):
        judged = judge_tree_of(scorer, example)
        sample, texts = samples[example.key], [variant.text for variant in example.variants]
        pairs = list(zip(judged.first.tolist(), judged.second.tolist(), judged.slots.tolist(), strict=True))
        places: list[Place] = []
        for first, segment in {first: judged.tree.segments[slot].parent for first, _, slot in pairs}.items():
            places += candidate_places(scorer, sample, segment, f"First: {texts[first]}\n")
        for first, second, slot in pairs:
            if second != ALONE:
                places += candidate_places(scorer, sample, slot, f"Second: {texts[second]}\nBetter:")
            verdict = target_verdict(example, first, second, len(scorer.verdict_values))
            places.append((slot, judged.tree.segments[slot].tokens.size - 1, verdict, VERDICT))
        items.append(lesson(judged.tree, places))
    return items


def claim_places(
    scorer: Scorer, known: Sequence[str], segment: int, shown: str, sentence: str, truth: bool
) -> list[Place]:
    """The places of one claim, the last sentence of what is shown of the segment.

    After its last token it is whether the claim is true, after each token of "There is a ..." whether some fact begins so.
    """
    bad = len(scorer.verdict_values) - 1
    own = scorer.encode(sentence)
    begin = len(scorer.encode(shown)) - len(own)
    places = []
    if sentence.startswith("There is a"):
        starts = {tuple(fact[:n]) for fact in map(scorer.encode, known) for n in range(len(fact) + 1)}
        told = ((n, tuple(own[: n + 1]) in starts) for n in range(3, len(own) - 1))
        places = [(segment, begin + n, 0 if right else bad, CLAIM) for n, right in told]
    return [*places, (segment, begin + len(own) - 1, 0 if truth else bad, CLAIM)]


def candidate_places(scorer: Scorer, sample: Sample, segment: int, shown: str) -> list[Place]:
    """The places of all that a candidate claims, and of the whole after its answer."""
    judgement = judge_sample(sample, parse_response(shown[shown.index("<see>") : shown.rindex("\n")]))
    assert judgement is not None
    places: list[Place] = []
    at = 0
    for sentence, _, verdict in judgement.claims:
        at = shown.index(sentence, at) + len(sentence)
        places += claim_places(scorer, sample.facts, segment, shown[:at], sentence, verdict != "false")
    end = len(scorer.encode(shown[: shown.rindex("\n")])) - 1
    return [*places, (segment, end, 0 if judgement.aligned else len(scorer.verdict_values) - 1, WHOLE)]


def lesson_loss(scorer: Scorer) -> Loss:
    """Cross entropy over the verdict tokens, weighted by what is judged."""

    def loss(
        hidden: Tensor, forest: Forest, head: Tensor, inside: Sequence[TrainingItem], total: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        lessons: list[Lesson] = [item.meta for item in inside]
        starts = [np.array(own)[one.segment] for own, one in zip(forest.segment_start, lessons, strict=True)]
        rows = np.concatenate([start + one.offset for start, one in zip(starts, lessons, strict=True)])
        targets = torch.from_numpy(np.concatenate([one.target for one in lessons]))  # [n]
        kinds = np.concatenate([one.kind for one in lessons])
        logits = hidden[torch.from_numpy(rows)].float() @ head[scorer.verdict_token_ids].float().T  # [n, K]
        right = (logits.argmax(-1) == targets).numpy()
        metrics: dict[str, Tensor] = {}
        for kind, name in enumerate(("claims", "wholes", "verdicts")):
            metrics |= {
                name: torch.tensor((kinds == kind).sum()),
                f"right_{name}": torch.tensor(right[kinds == kind].sum()),
            }
        weights = torch.from_numpy(WEIGHTS[kinds]).float()
        return (weights * F.cross_entropy(logits, targets, reduction="none")).sum() / total, metrics

    return loss


def lesson_weight(items: Sequence[TrainingItem]) -> float:
    """The denominator: each place by its weight."""
    return float(sum(WEIGHTS[item.meta.kind].sum() for item in items))


def main(
    output: Annotated[Path, typer.Option(help="where the checkpoint goes")],
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train the embedded R-Scorer and write it with the record of how it was made.

    `output`/checking holds it as it was after the first stage, which is not run again where it is there already.
    """
    torch.set_num_threads(threads)
    recipe = Recipe()
    started = time.monotonic()
    easy, easy_held_out = easy_vqa_raps(recipe.easy_vqa_samples, recipe.seed)
    raps = world_raps(recipe.samples, recipe.seed) + easy

    def log(metrics: dict[str, float]) -> None:
        if metrics["step"] % 20 == 0:
            counts = {name: metrics[name] for name in ("claims", "wholes", "verdicts") if metrics[name]}
            shares = {name: round(metrics[f"right_{name}"] / count, 3) for name, count in counts.items()}
            line = f"step {metrics['step']} loss {metrics['loss']:.4f} right {shares}"
            print(f"{line} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    def teach(start: Path, stage: Path, items: Callable[[Scorer], list[TrainingItem]], **settings: Any) -> None:
        if stage != output and (stage / "config.json").exists():
            return
        # An adapter leaves in place what the decoder has learnt; trained as a whole it has to learn to look things up anew.
        scorer = load_scorer(start, lora=LoRAConfig(recipe.lora_r, 2.0 * recipe.lora_r, seed=recipe.seed))
        # Three times fp32's GEMM rate where the CPU has bf16. A cache would keep the weights' first copies for all steps.
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            train(
                scorer.text_model,
                items(scorer),
                loss=lesson_loss(scorer),
                denominator=lesson_weight,
                settings=TrainingSettings(
                    **settings,
                    micro_batch_size=recipe.trees_per_step,
                    token_budget=32_768,
                    warmup_ratio=0.05,
                    weight_decay=0.02,
                    seed=recipe.seed,
                ),
                on_step=log,
            )
        merge_lora(scorer.text_model)
        model = scorer.text_model.to(torch.bfloat16) if stage == output else scorer.text_model
        save_text_model(model, stage)

    rng = random.Random(f"scorer/{recipe.seed}")
    decoder_as_text_model(load_lvlm("embedded"), output)
    teach(
        output,
        output / "checking",
        lambda scorer: checking_items(scorer, raps, recipe, random.Random(f"checking/{recipe.seed}")),
        epochs=recipe.checking_epochs,
        learning_rate=recipe.checking_learning_rate,
    )
    teach(
        output / "checking",
        output,
        lambda scorer: comparing_items(scorer, raps, recipe, random.Random(f"comparing/{recipe.seed}")),
        epochs=recipe.comparing_epochs,
        learning_rate=recipe.comparing_learning_rate,
    )
    shipped = load_scorer(output)
    held_out = world_raps(recipe.held_out_samples, recipe.seed + 1, split="validation")
    scores = {
        name: evaluate_scorer(shipped, scorer_examples(own, rng, VOCABULARY, is_faulty=is_faulty))
        for name, own in (("world", held_out), ("easy_vqa", easy_held_out))
    }
    record = {
        "command": "python -m srcfast.stages.embedded_scorer --output DIR",
        "recipe": asdict(recipe),
        "held_out": scores,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - started),
    }
    (output / "TRAINING.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(scores, indent=2), file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
