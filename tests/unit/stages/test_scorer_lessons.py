"""What the embedded R-Scorer is taught: the right word at the right token."""

import random

import numpy as np
import pytest
import torch
import typer

from srcfast.data.forest import Forest
from srcfast.data.records import Sample
from srcfast.models.scorer import load_scorer
from srcfast.recipes.scorer_lessons import (
    BEGUN,
    CLAIM,
    VERDICT,
    WEIGHTS,
    WHOLE,
    checking_items,
    comparing_items,
    lesson_loss,
    lesson_weight,
)
from srcfast.recipes.train_scorer import Recipe, parse_qualities, train_items
from srcfast.stages.scorer_training import Variant, scorer_example, with_quality
from srcfast.training.items import TrainingItem
from srcfast.world.rationales import facts
from srcfast.world.scenes import Object, Scene

SCENE = Scene((Object("circle", "red", "small", "top left"), Object("star", "blue", "large", "center")), "plain")
SAMPLE = Sample(
    id="a",
    images=(),
    question="What color is the star?",
    answer="blue",
    facts=facts(SCENE),
    extra={"program": {"op": "query", "attribute": "color", "of": {"shape": "star"}}, "scene": SCENE.to_json()},
)
RIGHT = (
    "<see> There is a large blue star at the center. </see> <think> The star is blue. </think> <answer> blue </answer>"
)
WRONG = "<see> There is a large red star at the center. </see> <think> The star is red. </think> <answer> red </answer>"


@pytest.fixture(scope="module")
def scorer():
    return load_scorer("embedded")


def words(scorer, item: TrainingItem) -> list[tuple[int, str, int, int]]:
    """(segment, the text up to the place, verdict, kind) of every place of a lesson."""
    found = []
    rows = zip(item.meta.segment, item.meta.offset, item.meta.target, item.meta.kind, strict=True)
    for segment, offset, target, kind in rows:
        tokens = item.tree.segments[segment].tokens[: offset + 1]
        found.append((int(segment), scorer.text_model.tokenizer.decode(tokens), int(target), int(kind)))
    return found


def test_a_claim_is_called_false_from_the_first_token_that_no_fact_has(scorer):
    example = scorer_example(SAMPLE, [Variant(RIGHT, 0), Variant(WRONG, 1, "own")])
    [item] = checking_items(scorer, {"a": SAMPLE}, [example], random.Random(0), drills=0, claims_per_drill=0)
    told = words(scorer, item)
    assert all(verdict == 0 for segment, _, verdict, _ in told if segment == 1)
    wrong = {text.split()[-1]: verdict for segment, text, verdict, kind in told if segment == 2 and kind == BEGUN}
    assert wrong["large"] == 0 and wrong["red"] == 2 and wrong["star"] == 2 and wrong["center"] == 2
    ends = [(text.split()[-1], verdict) for segment, text, verdict, kind in told if segment == 2 and kind == CLAIM]
    assert ends == [("center.", 2), ("red.", 2), ("red", 2)]  # what is seen, what is concluded, the answer
    wholes = [(segment, verdict) for segment, _, verdict, kind in told if kind == WHOLE]
    assert wholes == [(1, 0), (2, 2)]


def test_the_answer_is_judged_at_its_last_token_and_the_whole_at_its_end(scorer):
    example = scorer_example(
        SAMPLE, [Variant(RIGHT, 0), Variant("<see> There is a star. </see> <answer> no </answer>", 1)]
    )
    [item] = checking_items(scorer, {"a": SAMPLE}, [example], random.Random(0), drills=0, claims_per_drill=0)
    by_segment = {}
    for segment, text, verdict, kind in words(scorer, item):
        by_segment.setdefault(segment, []).append((text, verdict, kind))
    (answer, good, _), (whole, whole_good, kind) = by_segment[1][-2:]
    assert (
        answer.endswith("blue")
        and good == 0
        and whole.rstrip().endswith("</answer>")
        and (whole_good, kind) == (0, WHOLE)
    )
    (answer, good, _), (_, whole_good, _) = by_segment[2][-2:]
    assert answer.endswith("no") and good == 2 and whole_good == 2


def test_drills_hold_true_and_false_claims_and_answers(scorer):
    example = scorer_example(SAMPLE, [Variant(RIGHT, 0)])
    [item] = checking_items(scorer, {"a": SAMPLE}, [example], random.Random(3), drills=40, claims_per_drill=3)
    assert len(item.tree.segments) == 42
    claims = [verdict for segment, _, verdict, kind in words(scorer, item) if segment > 1 and kind == CLAIM]
    assert 0.25 < np.mean(np.array(claims) == 2) < 0.75
    answers = [(text, v) for segment, text, v, _ in words(scorer, item) if segment > 1 and "<answer>" in text]
    assert len(answers) == 40 and {v for _, v in answers} == {0, 2}
    assert all((v == 0) == text.endswith("blue") for text, v in answers)


def test_comparing_asks_for_a_verdict_at_every_slot(scorer):
    example = scorer_example(SAMPLE, [Variant(RIGHT, 0), Variant(WRONG, 1, "own")])
    [item] = comparing_items(scorer, {"a": SAMPLE}, [example])
    verdicts = [(text, verdict) for _, text, verdict, kind in words(scorer, item) if kind == VERDICT]
    assert all(text.endswith("Better:") for text, _ in verdicts)
    assert sorted(verdict for _, verdict in verdicts) == [0, 0, 2, 2]  # two pairs, two candidates rated alone
    pairs = {"red" in text: verdict for text, verdict in verdicts if "<answer>" in text}
    assert pairs == {True: 0, False: 2}  # the second is the wrong one: the first is better; and the other way round


def test_the_loss_is_the_weighted_mean_over_all_places_whatever_the_cut(scorer):
    example = scorer_example(SAMPLE, [Variant(RIGHT, 0), Variant(WRONG, 1, "own")])
    [one] = checking_items(scorer, {"a": SAMPLE}, [example], random.Random(0), drills=2, claims_per_drill=2)
    [other] = comparing_items(scorer, {"a": SAMPLE}, [example])
    loss = lesson_loss(scorer)
    head = scorer.text_model.decoder.head
    total = lesson_weight([one, other])
    assert total == pytest.approx(sum(WEIGHTS[item.meta.kind].sum() for item in (one, other)))

    def of(*items):
        forest = Forest.of([item.tree for item in items])
        with torch.no_grad():
            return float(loss(scorer(forest), forest, head, items, total)[0])

    assert of(one, other) == pytest.approx(of(one) + of(other), rel=1e-5)  # fp32 sums in another order


@pytest.mark.parametrize("quality", ["noisy", "partial", "answer"])
def test_labels_stay_those_of_the_truth_but_claims_that_a_worse_reference_leaves_out_have_none(scorer, quality):
    whole = scorer_example(SAMPLE, [Variant(RIGHT, 0), Variant(WRONG, 1)])
    true, worse = (
        comparing_items(scorer, {"a": SAMPLE}, [example])[0]
        for example in (whole, with_quality(whole, SAMPLE, quality, seed=3))
    )
    of_true, of_worse = (
        [(text, verdict, kind) for _, text, verdict, kind in words(scorer, item)] for item in (true, worse)
    )
    # Claims end with a full stop, an answer, which every reference has, doesn't.
    left = [label for label in of_true if label[2] != BEGUN and not (label[2] == CLAIM and label[0].endswith("."))]
    assert of_worse == left and len(left) < len(of_true)
    assert {kind for _, _, kind in of_worse} == {CLAIM, WHOLE, VERDICT}
    roots = [scorer.text_model.tokenizer.decode(item.tree.segments[0].tokens) for item in (true, worse)]
    assert roots[0] != roots[1] and roots[1].strip().startswith(("A detail", "Details are", "The reference"))


def test_the_recipe_s_training_lowers_its_loss():
    scorer = load_scorer("embedded")
    example = scorer_example(SAMPLE, [Variant(RIGHT, 0), Variant(WRONG, 1, "own")])
    [item] = comparing_items(scorer, {"a": SAMPLE}, [example])

    def loss() -> float:
        forest, head = Forest.of([item.tree]), scorer.text_model.decoder.head
        with torch.no_grad():
            return float(lesson_loss(scorer)(scorer(forest), forest, head, [item], lesson_weight([item]))[0])

    before = loss()
    train_items(scorer, [item], Recipe(), epochs=4)
    assert loss() < 0.9 * before


def test_the_recipe_takes_names_of_qualities_and_refuses_others():
    assert parse_qualities("complete") == ("complete",) and parse_qualities("noisy, answer") == ("noisy", "answer")
    for text in ("", "no", "noisy,"):
        with pytest.raises(typer.BadParameter, match="partial"):
            parse_qualities(text)
