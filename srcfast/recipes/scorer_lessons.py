"""The embedded R-Scorer's curriculum: training trees with positions at which a verdict token is the label.

With verdicts alone, one label for sixty tokens, a model of this size takes far longer to learn to look claims up in the facts.
So there are also labels for each claim, token by token where the claim names an object, for each answer, and for each candidate
as a whole: the first verdict means right, the last one wrong.
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

BEGUN, CLAIM, WHOLE, VERDICT = range(4)  # kinds of labels: of a claim so far, a claim, a candidate, a pair
KINDS = ("begun", "claims", "wholes", "verdicts")
WEIGHTS = np.array([1.0, 3.0, 4.0, 5.0])  # of these kinds in the loss

Label = tuple[int, int, int, int]  # segment, offset within it, verdict, kind (BEGUN, CLAIM, WHOLE or VERDICT)


@dataclass(frozen=True)
class Lesson:
    """Labels of one tree, [n] each: segment, offset within it, index of the verdict token, kind."""

    segment: np.ndarray
    offset: np.ndarray
    target: np.ndarray
    kind: np.ndarray


def lesson(tree: Tree, labels: Sequence[Label]) -> TrainingItem:
    """Build the training item of a tree and its labels."""
    return TrainingItem(tree, Lesson(*np.array(labels).T))


def checking_items(
    scorer: Scorer,
    samples: Mapping[str, Sample],
    examples: Sequence[ScorerExample],
    rng: random.Random,
    drills: int,
    claims_per_drill: int,
) -> list[TrainingItem]:
    """Build trees without second candidates: below the reference are candidates, and drills of claims and an answer.

    Args:
        scorer: encodes the texts.
        samples: the examples' samples by id, with their scenes.
        examples: candidates of each sample.
        rng: draws claims and answers.
        drills: drills of each example; about half of their claims and answers are false.
        claims_per_drill: maximum number of claims of a drill.
    """
    answers = sorted({sample.answer for sample in samples.values()})
    items = []
    for example in examples:
        sample = samples[example.key]
        begun = beginnings(scorer, sample)
        segments = [Segment(np.concatenate([scorer.opening, scorer.encode(example.reference)]))]
        labels: list[Label] = []
        for variant in example.variants:
            shown = f"First: {variant.text}\n"
            labels += candidate_labels(scorer, sample, begun, len(segments), shown)
            segments.append(Segment(scorer.encode(shown), 0))
        for _ in range(drills):
            claims = draw_claims(Scene.from_json(sample.extra["scene"]), rng, claims_per_drill)
            answer = drawn_answer(sample, rng, answers)
            shown = f"First: <see> {' '.join(claims)} </see> <answer> {answer} </answer>\n"
            at = 0
            for sentence, truth in claims.items():
                at = shown.index(sentence, at) + len(sentence)
                labels += claim_labels(scorer, begun, len(segments), shown[:at], sentence, truth)
            labels.append(answer_label(scorer, len(segments), shown, answer == sample.answer))
            segments.append(Segment(scorer.encode(shown), 0))
        items.append(lesson(Tree(tuple(segments)), labels))
    return items


def comparing_items(
    scorer: Scorer, samples: Mapping[str, Sample], examples: Sequence[ScorerExample]
) -> list[TrainingItem]:
    """Build the trees that the R-Scorer compares candidates by, with labels for verdicts, claims and candidates."""
    items = []
    for example in examples:
        judge_tree = judge_tree_of(scorer, example)
        sample, texts = samples[example.key], [variant.text for variant in example.variants]
        begun = beginnings(scorer, sample)
        pairs = list(zip(judge_tree.first.tolist(), judge_tree.second.tolist(), judge_tree.slots.tolist(), strict=True))
        labels: list[Label] = []
        for first, segment in {first: judge_tree.tree.segments[slot].parent for first, _, slot in pairs}.items():
            labels += candidate_labels(scorer, sample, begun, segment, f"First: {texts[first]}\n")
        for first, second, slot in pairs:
            if second != ALONE:
                labels += candidate_labels(scorer, sample, begun, slot, f"Second: {texts[second]}\nBetter:")
            verdict = target_verdict(example, first, second, len(scorer.verdict_values))
            labels.append((slot, judge_tree.tree.segments[slot].tokens.size - 1, verdict, VERDICT))
        items.append(lesson(judge_tree.tree, labels))
    return items


def drawn_answer(sample: Sample, rng: random.Random, answers: Sequence[str]) -> str:
    """Draw an answer: the right one or, with probability 1/2, another, of its class or any."""
    if rng.random() < 0.5:
        return sample.answer
    near = swap_word(sample.answer, rng, VOCABULARY) if rng.random() < 0.7 else None
    return near or rng.choice(answers)


def beginnings(scorer: Scorer, sample: Sample) -> set[tuple[int, ...]]:
    """Return all token sequences with which some fact of the sample begins."""
    facts = [scorer.encode(fact).tolist() for fact in sample.facts]
    return {tuple(fact[:n]) for fact in facts for n in range(len(fact) + 1)}


def claim_labels(
    scorer: Scorer, begun: set[tuple[int, ...]], segment: int, shown: str, sentence: str, truth: bool
) -> list[Label]:
    """Label one claim.

    The label after its last token says whether the claim is true; those after tokens of "There is a ..." say whether some fact
    begins with the claim up to there.

    Args:
        begun: see `beginnings`.
        shown: the segment's text up to the end of the claim.
        sentence: the claim.
    """
    wrong = len(scorer.verdict_values) - 1
    tokens = scorer.encode(sentence).tolist()
    start = len(scorer.encode(shown)) - len(tokens)
    labels = []
    if sentence.startswith("There is a"):
        prefixes = ((n, tuple(tokens[: n + 1]) in begun) for n in range(3, len(tokens) - 1))
        labels = [(segment, start + n, 0 if right else wrong, BEGUN) for n, right in prefixes]
    return [*labels, (segment, start + len(tokens) - 1, 0 if truth else wrong, CLAIM)]


def answer_label(scorer: Scorer, segment: int, shown: str, right: bool) -> Label:
    """Label the last token of the answer by whether it is right."""
    before = shown.rindex("</answer>" if "</answer>" in shown else "\n")
    end = len(scorer.encode(shown[:before].rstrip())) - 1
    return segment, end, 0 if right else len(scorer.verdict_values) - 1, CLAIM


def candidate_labels(
    scorer: Scorer, sample: Sample, begun: set[tuple[int, ...]], segment: int, shown: str
) -> list[Label]:
    """Label all claims of a candidate, its answer, and at its end the candidate as a whole."""
    text = shown[shown.index(": ") + 2 : shown.rindex("\n")]
    verification = verify_sample(sample, parse_response(text))
    assert verification is not None
    labels: list[Label] = []
    at = 0
    for sentence, _, verdict in verification.claims:
        at = shown.index(sentence, at) + len(sentence)
        labels += claim_labels(scorer, begun, segment, shown[:at], sentence, verdict != "false")
    labels.append(answer_label(scorer, segment, shown, verification.answer_right))
    end = len(scorer.encode(shown[: shown.rindex("\n")])) - 1
    return [*labels, (segment, end, 0 if verification.aligned else len(scorer.verdict_values) - 1, WHOLE)]


def lesson_loss(scorer: Scorer) -> Loss:
    """Return a loss: cross entropy over the verdict tokens, weighted by kind, and counts of right predictions by kind."""

    def loss(
        hidden: Tensor, forest: Forest, head: Tensor, items: Sequence[TrainingItem], total: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        lessons: list[Lesson] = [item.meta for item in items]
        segment_starts = zip(forest.segment_start, lessons, strict=True)
        starts = [np.array(tree_starts)[meta.segment] for tree_starts, meta in segment_starts]
        rows = np.concatenate([start + meta.offset for start, meta in zip(starts, lessons, strict=True)])
        targets = torch.from_numpy(np.concatenate([meta.target for meta in lessons]))  # [n]
        kinds = np.concatenate([meta.kind for meta in lessons])
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
    """Return the loss's denominator: the sum of the labels' weights."""
    return float(sum(WEIGHTS[item.meta.kind].sum() for item in items))
