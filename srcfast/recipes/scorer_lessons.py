"""What the embedded R-Scorer is taught: places in judge trees at which a verdict token is to be said.

Verdicts alone, one label for sixty tokens, take far longer to teach a model of this size to look things up in the facts.
So it is also told of every claim, token by token where the claim names an object, of every answer, and of every candidate as
a whole whether it is right: the first verdict for right, the last for wrong.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srcfast.data.corruptions import swap_word
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Sample
from srcfast.models.scorer import ALONE, Scorer
from srcfast.stages.scorer_training import ScorerExample, judge_tree_of, target_verdict
from srcfast.training.items import Loss, TrainingItem
from srcfast.world.claims import VOCABULARY, draw_claims
from srcfast.world.oracle import verify_sample
from srcfast.world.scenes import Scene

BEGUN, CLAIM, WHOLE, VERDICT = range(4)  # what is judged: a claim so far, a claim, a candidate at its end, a pair
KINDS = ("begun", "claims", "wholes", "verdicts")
WEIGHTS = np.array([1.0, 3.0, 4.0, 5.0])  # in the loss

Place = tuple[int, int, int, int]  # segment, offset within it, verdict, kind (BEGUN, CLAIM, WHOLE or VERDICT)


@dataclass(frozen=True)
class Lesson:
    """Places of one tree where a verdict token is to be said, [n] each."""

    segment: np.ndarray
    offset: np.ndarray
    target: np.ndarray
    kind: np.ndarray


def lesson(tree: Tree, places: Sequence[Place]) -> TrainingItem:
    """The training item of a tree and its places."""
    return TrainingItem(tree, Lesson(*np.array(places).T))


def checking_items(
    scorer: Scorer,
    samples: Mapping[str, Sample],
    examples: Sequence[ScorerExample],
    rng: random.Random,
    drills: int,
    claims_per_drill: int,
) -> list[TrainingItem]:
    """Judge trees without seconds: below the reference stand the candidates, and drills made of claims and an answer.

    Args:
        samples: those of the examples, by id; their scenes are known.
        drills: for each example; about half of their claims and answers are false.
    """
    answers = sorted({sample.answer for sample in samples.values()})
    items = []
    for example in examples:
        sample = samples[example.key]
        begun = beginnings(scorer, sample)
        segments = [Segment(np.concatenate([scorer.opening, scorer.encode(example.reference)]))]
        places: list[Place] = []
        for variant in example.variants:
            shown = f"First: {variant.text}\n"
            places += candidate_places(scorer, sample, begun, len(segments), shown)
            segments.append(Segment(scorer.encode(shown), 0))
        for _ in range(drills):
            claims = draw_claims(Scene.from_json(sample.extra["scene"]), rng, claims_per_drill)
            answer = drawn_answer(sample, rng, answers)
            shown = f"First: <see> {' '.join(claims)} </see> <answer> {answer} </answer>\n"
            at = 0
            for sentence, truth in claims.items():
                at = shown.index(sentence, at) + len(sentence)
                places += claim_places(scorer, begun, len(segments), shown[:at], sentence, truth)
            places.append(answer_place(scorer, len(segments), shown, answer == sample.answer))
            segments.append(Segment(scorer.encode(shown), 0))
        items.append(lesson(Tree(tuple(segments)), places))
    return items


def comparing_items(
    scorer: Scorer, samples: Mapping[str, Sample], examples: Sequence[ScorerExample]
) -> list[TrainingItem]:
    """The judge trees themselves: verdicts, and a word on each claim and candidate."""
    items = []
    for example in examples:
        judged = judge_tree_of(scorer, example)
        sample, texts = samples[example.key], [variant.text for variant in example.variants]
        begun = beginnings(scorer, sample)
        pairs = list(zip(judged.first.tolist(), judged.second.tolist(), judged.slots.tolist(), strict=True))
        places: list[Place] = []
        for first, segment in {first: judged.tree.segments[slot].parent for first, _, slot in pairs}.items():
            places += candidate_places(scorer, sample, begun, segment, f"First: {texts[first]}\n")
        for first, second, slot in pairs:
            if second != ALONE:
                places += candidate_places(scorer, sample, begun, slot, f"Second: {texts[second]}\nBetter:")
            verdict = target_verdict(example, first, second, len(scorer.verdict_values))
            places.append((slot, judged.tree.segments[slot].tokens.size - 1, verdict, VERDICT))
        items.append(lesson(judged.tree, places))
    return items


def drawn_answer(sample: Sample, rng: random.Random, answers: Sequence[str]) -> str:
    """The right answer or, half of the time, another: one of its class, or any."""
    if rng.random() < 0.5:
        return sample.answer
    near = swap_word(sample.answer, rng, VOCABULARY) if rng.random() < 0.7 else None
    return near or rng.choice(answers)


def beginnings(scorer: Scorer, sample: Sample) -> set[tuple[int, ...]]:
    """The tokens with which some fact of the sample begins."""
    facts = [scorer.encode(fact).tolist() for fact in sample.facts]
    return {tuple(fact[:n]) for fact in facts for n in range(len(fact) + 1)}


def claim_places(
    scorer: Scorer, begun: set[tuple[int, ...]], segment: int, shown: str, sentence: str, truth: bool
) -> list[Place]:
    """The places of one claim, the last sentence of what is shown of the segment.

    After its last token it is whether the claim is true, after each token of "There is a ..." whether some fact begins so.
    """
    wrong = len(scorer.verdict_values) - 1
    own = scorer.encode(sentence).tolist()
    start = len(scorer.encode(shown)) - len(own)
    places = []
    if sentence.startswith("There is a"):
        told = ((n, tuple(own[: n + 1]) in begun) for n in range(3, len(own) - 1))
        places = [(segment, start + n, 0 if right else wrong, BEGUN) for n, right in told]
    return [*places, (segment, start + len(own) - 1, 0 if truth else wrong, CLAIM)]


def answer_place(scorer: Scorer, segment: int, shown: str, right: bool) -> Place:
    """Whether the answer is the right one, said after its last token."""
    before = shown.rindex("</answer>" if "</answer>" in shown else "\n")
    end = len(scorer.encode(shown[:before].rstrip())) - 1
    return segment, end, 0 if right else len(scorer.verdict_values) - 1, CLAIM


def candidate_places(
    scorer: Scorer, sample: Sample, begun: set[tuple[int, ...]], segment: int, shown: str
) -> list[Place]:
    """The places of all that a candidate claims, of its answer, and of the whole at its end."""
    text = shown[shown.index(": ") + 2 : shown.rindex("\n")]
    judgement = verify_sample(sample, parse_response(text))
    assert judgement is not None
    places: list[Place] = []
    at = 0
    for sentence, _, verdict in judgement.claims:
        at = shown.index(sentence, at) + len(sentence)
        places += claim_places(scorer, begun, segment, shown[:at], sentence, verdict != "false")
    places.append(answer_place(scorer, segment, shown, judgement.answer_right))
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
        for kind, name in enumerate(KINDS):
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
