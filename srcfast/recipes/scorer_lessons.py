"""The embedded R-Scorer's curriculum: training trees with positions at which a verdict token is the label.

With verdicts alone, one label for sixty tokens, a model of this size takes far longer to learn to look claims up in the facts.
So there are also labels for each claim, token by token where the claim names an object, for each answer, and for each candidate
as a whole: the first verdict means right, the last one wrong.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srcfast.data.corruptions import swap_word
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Sample
from srcfast.models.head import Head
from srcfast.models.scorer import ALONE, Scorer
from srcfast.stages.scorer_training import ScorerExample, judge_tree_of, target_verdict
from srcfast.stages.scoring import sample_reference
from srcfast.training.items import Loss, TrainingItem
from srcfast.world.claims import draw_claims, truth_of, vocabulary_of
from srcfast.world.verification import verify_sample

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


class Labels:
    """Collect the labels of one tree, whose texts are about a sample."""

    def __init__(self, scorer: Scorer, sample: Sample) -> None:
        self.scorer, self.sample = scorer, sample
        facts = [scorer.encode(fact).tolist() for fact in sample.facts]
        # All token sequences with which some fact of the sample begins.
        self.begun = {tuple(fact[:n]) for fact in facts for n in range(len(fact) + 1)}
        self.wrong = len(scorer.verdict_values) - 1
        self.rows: list[Label] = []

    def item(self, tree: Tree) -> TrainingItem:
        """Build the training item of a tree and its labels."""
        return TrainingItem(tree, Lesson(*np.array(self.rows).T))

    def last_token(self, segment: int, shown: str, right: bool, kind: int) -> None:
        """Label the last token of the text `shown`, with which a segment begins."""
        self.rows.append((segment, len(self.scorer.encode(shown)) - 1, 0 if right else self.wrong, kind))

    def claims(self, segment: int, shown: str, claims: Iterable[tuple[str, bool]]) -> None:
        """Label claims, with whether each is true, in the order in which a segment's text `shown` has them.

        The label after a claim's last token says whether it is true; those after tokens of "There is a ..." say whether some
        fact begins with the claim up to there.
        """
        at = 0
        for sentence, truth in claims:
            at = shown.index(sentence, at) + len(sentence)
            if sentence.startswith("There is a"):
                tokens = self.scorer.encode(sentence).tolist()
                start = len(self.scorer.encode(shown[:at])) - len(tokens)
                for n in range(3, len(tokens) - 1):
                    verdict = 0 if tuple(tokens[: n + 1]) in self.begun else self.wrong
                    self.rows.append((segment, start + n, verdict, BEGUN))
            self.last_token(segment, shown[:at], truth, CLAIM)

    def answer(self, segment: int, shown: str, right: bool) -> None:
        """Label the last token of the answer by whether it is right."""
        before = shown.rindex("</answer>" if "</answer>" in shown else "\n")
        self.last_token(segment, shown[:before].rstrip(), right, CLAIM)

    def candidate(self, segment: int, shown: str, claims: bool = True) -> None:
        """Label all claims of a candidate if `claims`, its answer, and at its end the candidate as a whole."""
        end = shown.rindex("\n")
        verification = verify_sample(self.sample, parse_response(shown[shown.index(": ") + 2 : end]))
        assert verification is not None
        if claims:
            self.claims(segment, shown, ((sentence, truth != "false") for sentence, _, truth in verification.claims))
        self.answer(segment, shown, verification.answer_right)
        self.last_token(segment, shown[:end], verification.aligned, WHOLE)


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
        samples: the examples' samples by id, with the truth about their images.
        examples: candidates of each sample.
        rng: draws claims and answers.
        drills: drills of each example; about half of their claims and answers are false.
        claims_per_drill: maximum number of claims of a drill.
    """
    answers = sorted({sample.answer for sample in samples.values()})
    items = []
    for example in examples:
        sample = samples[example.key]
        segments = [Segment(np.concatenate([scorer.opening, scorer.encode(example.reference)]))]
        labels = Labels(scorer, sample)
        for variant in example.variants:
            shown = f"First: {variant.text}\n"
            labels.candidate(len(segments), shown)
            segments.append(Segment(scorer.encode(shown), 0))
        image = truth_of(sample)
        assert image is not None
        for _ in range(drills):
            claims = draw_claims(image, rng, claims_per_drill)
            answer = drawn_answer(sample, rng, answers)
            shown = f"First: <see> {' '.join(claims)} </see> <answer> {answer} </answer>\n"
            labels.claims(len(segments), shown, claims.items())
            labels.answer(len(segments), shown, answer == sample.answer)
            segments.append(Segment(scorer.encode(shown), 0))
        items.append(labels.item(Tree(tuple(segments))))
    return items


def comparing_items(
    scorer: Scorer, samples: Mapping[str, Sample], examples: Sequence[ScorerExample]
) -> list[TrainingItem]:
    """Build the trees that the R-Scorer compares candidates by, with labels for verdicts, claims and candidates.

    Where the reference is worse than the complete one, claims have no labels: what it leaves out can't be looked up.
    """
    items = []
    for example in examples:
        judge_tree = judge_tree_of(scorer, example)
        texts = [variant.text for variant in example.variants]
        pairs = list(zip(judge_tree.first.tolist(), judge_tree.second.tolist(), judge_tree.slots.tolist(), strict=True))
        sample = samples[example.key]
        labels, complete = Labels(scorer, sample), example.reference == sample_reference(sample)
        for first, segment in {first: judge_tree.tree.segments[slot].parent for first, _, slot in pairs}.items():
            labels.candidate(segment, f"First: {texts[first]}\n", complete)
        for first, second, slot in pairs:
            if second != ALONE:
                labels.candidate(slot, f"Second: {texts[second]}\nBetter:", complete)
            verdict = target_verdict(example, first, second, len(scorer.verdict_values))
            labels.rows.append((slot, judge_tree.tree.segments[slot].tokens.size - 1, verdict, VERDICT))
        items.append(labels.item(judge_tree.tree))
    return items


def drawn_answer(sample: Sample, rng: random.Random, answers: Sequence[str]) -> str:
    """Draw an answer: the right one or, with probability 1/2, another, of its class or any."""
    if rng.random() < 0.5:
        return sample.answer
    near = swap_word(sample.answer, rng, vocabulary_of(truth_of(sample))) if rng.random() < 0.7 else None
    return near or rng.choice(answers)


def lesson_loss(scorer: Scorer) -> Loss:
    """Return a loss: cross entropy over the verdict tokens, weighted by kind, and counts of right predictions by kind."""

    def loss(
        hidden: Tensor, forest: Forest, head: Head, items: Sequence[TrainingItem], total: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        lessons: list[Lesson] = [item.meta for item in items]
        by_tree = zip(forest.segment_start, lessons, strict=True)
        rows = np.concatenate([np.array(starts)[meta.segment] + meta.offset for starts, meta in by_tree])
        targets = torch.from_numpy(np.concatenate([meta.target for meta in lessons]))  # [n]
        kinds = np.concatenate([meta.kind for meta in lessons])
        logits = head.logits(hidden[torch.from_numpy(rows)], scorer.verdict_token_ids)  # [n, K]
        right = (logits.argmax(-1) == targets).numpy()
        metrics: dict[str, Tensor] = {}
        for kind, name in enumerate(KINDS):
            metrics[name] = torch.tensor((kinds == kind).sum())
            metrics[f"right_{name}"] = torch.tensor(right[kinds == kind].sum())
        weights = torch.from_numpy(WEIGHTS[kinds]).float()
        return (weights * F.cross_entropy(logits, targets, reduction="none")).sum() / total, metrics

    return loss


def lesson_weight(items: Sequence[TrainingItem]) -> float:
    """Return the loss's denominator: the sum of the labels' weights."""
    return float(sum(WEIGHTS[item.meta.kind].sum() for item in items))
