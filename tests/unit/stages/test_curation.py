"""Curation: which pair is chosen, what is dropped and why, and the rates of the funnel."""

import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.plain_training import pairwise_cases
from pydantic import ValidationError

from srcfast.config.settings import CurationConfig
from srcfast.data.records import Candidate, Sample
from srcfast.errors import InputError
from srcfast.stages.curation import curate

LOOSE = CurationConfig(min_margin=0.0, min_confidence=0.0, max_length_ratio=100.0)


def sample(name="s", answer="red"):
    return Sample(
        id=name,
        images=("a.png",),
        question="Which colour?",
        answer=answer,
        rationale=None,
        facts=(),
        extra={},
        image_root=Path("images"),
    )


def candidate(index, answer="red", text=None, tokens=10, sample_id="s"):
    if text is None:
        text = f"<see> Thing {index} is {answer}. </see> <think> So it is. </think> <answer> {answer} </answer>"
    return Candidate(
        id=f"{sample_id}/{index}",
        sample_id=sample_id,
        text=text,
        rationale="",
        answer=answer,
        logprob=-1.0,
        token_ids=tuple(range(tokens)),
        extra={},
    )


def row(candidates, scores, confidence=0.8, **changes):
    n = len(candidates)
    grid = np.full((n, n), confidence) if np.isscalar(confidence) else np.asarray(confidence, dtype=float)
    return {
        "sample_id": candidates[0].sample_id,
        "candidate_ids": [c.id for c in candidates],
        "scores": list(scores),
        "win_probability": np.full((n, n), 0.5).tolist(),
        "confidence": grid.tolist(),
        "raw": np.full((n, n), 0.5).tolist(),
        "flip_rate": 0.25,
        "tie_rate": 0.5,
        "pairs": n * (n - 1) // 2,
        "verdicts": n * (n - 1),
    } | changes


def run(candidates, rows, settings=LOOSE, seed=0, samples=None):
    return curate(samples or [sample()], {"s": candidates}, rows, settings, seed)


def test_best_against_worst_by_score_weighted_by_the_pairs_confidence():
    own = [candidate(i, answer) for i, answer in enumerate(["blue", "red", "green", "red"])]
    confidence = np.arange(16).reshape(4, 4) / 16
    pairs, funnel = run(own, [row(own, [0.3, 0.9, 0.1, 0.6], confidence)])
    (pair,) = pairs
    assert (pair.chosen, pair.rejected) == (own[1].text, own[2].text)
    assert pair.confidence == confidence[1, 2] == 6 / 16
    assert (pair.prompt, pair.images, pair.image_root) == ("Which colour?", ("a.png",), Path("images"))
    assert pair.reference_chosen_logprob is None and pair.reference_rejected_logprob is None
    assert pair.extra["chosen_right"] and not pair.extra["rejected_right"]
    assert funnel["pair_correctness"]["right_over_wrong"] == 1.0
    assert [funnel[k] for k in ("samples", "with_two_parsed_distinct", "pairs_proposed", "kept")] == [
        1,
        1,
        1,
        1,
    ]
    assert not any(funnel["dropped"].values())


def test_without_weighting_every_pair_has_weight_one_and_the_confidence_is_kept_beside():
    own = [candidate(0), candidate(1, "blue")]
    (pair,), _ = run(own, [row(own, [0.9, 0.1], 0.3)], CurationConfig(weighting="none"))
    assert pair.confidence == 1.0 and pair.extra["judge_confidence"] == 0.3


@pytest.mark.parametrize(
    ("reason", "scores", "confidence", "tokens"),
    [
        ("margin", [0.60, 0.41], 0.8, [10, 10]),
        ("confidence", [0.9, 0.1], 0.29, [10, 10]),
        ("length", [0.9, 0.1], 0.8, [10, 21]),
        ("length", [0.9, 0.1], 0.8, [21, 10]),
        (None, [0.61, 0.4], 0.3, [10, 20]),
    ],
)
def test_each_threshold_drops_by_its_own_reason_and_bounds_are_inclusive(reason, scores, confidence, tokens):
    settings = CurationConfig(min_margin=0.2, min_confidence=0.3, max_length_ratio=2.0)
    own = [candidate(i, tokens=n) for i, n in enumerate(tokens)]
    pairs, funnel = run(own, [row(own, scores, confidence)], settings)
    dropped = {name: count for name, count in funnel["dropped"].items() if count}
    assert dropped == ({} if reason is None else {reason: 1})
    assert len(pairs) == funnel["kept"] == (reason is None)
    assert funnel["within_margin"] == (reason != "margin")
    assert funnel["within_confidence"] == (reason not in ("margin", "confidence"))


def test_the_best_of_several_bad_ones_can_be_refused_by_its_rating():
    own = [candidate(0), candidate(1, "blue")]
    rated = row(own, [0.9, 0.1], 0.8) | {"alone": [0.6, 0.1]}
    assert len(run(own, [rated], CurationConfig(min_rating=0.6))[0]) == 1
    pairs, funnel = run(own, [rated], CurationConfig(min_rating=0.61))
    assert not pairs and funnel["dropped"]["rating"] == 1
    with pytest.raises(InputError, match="alone"):
        run(own, [row(own, [0.9, 0.1], 0.8)], CurationConfig(min_rating=0.5))


def test_a_pair_without_confidence_is_dropped_even_without_a_threshold():
    own = [candidate(0), candidate(1)]
    pairs, funnel = run(own, [row(own, [0.5, 0.5], 0.0)])
    assert not pairs and funnel["dropped"]["confidence"] == 1


def test_only_parsed_distinct_candidates_are_paired():
    unparsed = candidate(1, text="I think that one can not really tell what is in this picture.")
    bare = candidate(2, text="red")  # an answer without a rationale
    twin = candidate(3, text=candidate(0).text)
    own = [candidate(0), unparsed, bare, twin]
    pairs, funnel = run(own, [row(own, [0.5, 0.1, 0.9, 0.5])])
    assert not pairs and funnel["dropped"]["fewer_than_two_parsed"] == 1
    own.append(candidate(4, "blue"))
    (pair,), _ = run(own, [row(own, [0.5, 0.1, 0.9, 0.5, 0.3])])
    assert (pair.extra["chosen_id"], pair.extra["rejected_id"]) == ("s/0", "s/4")


def test_samples_without_candidates_or_scores_are_counted_by_reason():
    own = [candidate(0), candidate(1)]
    samples = [sample(), sample("none")]
    pairs, funnel = run(own, [], samples=samples)
    assert not pairs
    assert funnel["dropped"]["not_scored"] == 1 and funnel["dropped"]["fewer_than_two_candidates"] == 1
    assert funnel["order_flip_rate"] is None and funnel["mean_confidence"] is None


def test_several_pairs_best_against_worst_or_disjoint():
    own = [candidate(i) for i in range(5)]
    scores = [0.5, 0.9, 0.1, 0.7, 0.3]

    def ids(choice, count):
        settings = CurationConfig(pairs_per_sample=count, pair_choice=choice, min_margin=0.3)
        pairs, funnel = run(own, [row(own, scores)], settings)
        return [(p.chosen, p.rejected) for p in pairs], funnel

    def texts(*indices):
        return [(own[a].text, own[b].text) for a, b in indices]

    assert ids("best_against_worst", 3)[0] == texts((1, 2), (1, 4), (1, 0))
    assert ids("disjoint", 3)[0] == texts((1, 2), (3, 4))
    kept, funnel = ids("best_against_worst", 9)
    assert kept == texts((1, 2), (1, 4), (1, 0)) and funnel["pairs_proposed"] == 4
    assert funnel["dropped"]["margin"] == 1


def test_pairing_by_answer_sets_a_right_against_a_wrong_answer_whatever_the_scores():
    own = [candidate(0, "blue"), candidate(1, "Red."), candidate(2, "green"), candidate(3, "red")]
    settings = CurationConfig(pairing="answer", pairs_per_sample=4)
    pairs, funnel = run(own, [row(own, [0.9, 0.1, 0.8, 0.2], 0.0)], settings)
    got = {(p.extra["chosen_id"], p.extra["rejected_id"]) for p in pairs}
    assert got == {(f"s/{a}", f"s/{b}") for a, b in itertools.product((1, 3), (0, 2))}
    assert {p.confidence for p in pairs} == {1.0} and funnel["pair_correctness"]["right_over_wrong"] == 1.0
    pairs, funnel = run(own[1::2], [], settings)
    assert not pairs and funnel["dropped"]["same_correctness"] == 1


def test_likelihood_weighs_among_candidates_of_about_the_same_score_and_the_worst_is_by_score_alone():
    candidates = [replace(candidate(k), logprob=p) for k, p in enumerate((-9.0, -2.0, -30.0, -1.0))]
    scores = [row(candidates, [0.9, 0.8, 0.7, 0.1])]
    chosen = {}
    for weight in (0.0, 0.1):
        [pair], _ = run(candidates, scores, LOOSE.replace(likelihood_weight=weight))
        chosen[weight] = (pair.extra["chosen_id"], pair.extra["rejected_id"])
    # log S + 0.1 log pi: log 0.9 - 0.9 = -1.01, log 0.8 - 0.2 = -0.42, log 0.7 - 3 = -3.36, log 0.1 - 0.1 = -2.40.
    assert chosen == {0.0: ("s/0", "s/3"), 0.1: ("s/1", "s/3")}
    # At 5 the likeliest is best, whose score is the lowest: a pair with any other is below the margin.
    assert run(candidates, scores, LOOSE.replace(likelihood_weight=5.0))[1]["dropped"]["margin"] == 1
    disjoint = LOOSE.replace(likelihood_weight=0.1, pairs_per_sample=9, pair_choice="disjoint")
    pairs, _ = run(candidates, scores, disjoint)
    assert [(p.extra["chosen_id"], p.extra["rejected_id"]) for p in pairs] == [("s/1", "s/3"), ("s/0", "s/2")]
    none = [replace(c, logprob=0.0) for c in candidates]
    [pair], _ = run(none, [row(none, [0.0, 0.0, 0.5, 0.0])], LOOSE.replace(likelihood_weight=1.0))
    assert pair.extra["chosen_id"] == "s/2"  # a score of 0 has a logarithm, too


def test_with_right_answers_the_best_of_them_goes_against_the_worst_of_all():
    candidates = [candidate(0, "blue"), candidate(1), candidate(2), candidate(3, "green")]
    scores = [row(candidates, [0.9, 0.5, 0.7, 0.1])]
    settings = LOOSE.replace(right_answer=True, pairs_per_sample=3)
    for choice, expected in (("best_against_worst", [("s/2", "s/3"), ("s/2", "s/1")]), ("disjoint", [("s/2", "s/3")])):
        pairs, funnel = run(candidates, scores, settings.replace(pair_choice=choice))
        assert [(p.extra["chosen_id"], p.extra["rejected_id"]) for p in pairs] == expected
        assert funnel["dropped"]["margin"] == 1  # a wrong answer with a higher score is not rejected for a lower one
    wrong = [candidate(k, answer) for k, answer in enumerate(("blue", "green"))]
    pairs, funnel = run(wrong, [row(wrong, [0.9, 0.5])], settings)
    assert not pairs and funnel["dropped"]["same_correctness"] == 1
    assert run(wrong, [row(wrong, [0.9, 0.5])], settings.replace(right_answer=False))[0]


def test_the_likeliest_right_candidate_goes_against_the_likeliest_others_whatever_the_scores():
    candidates = [candidate(0, "blue"), candidate(1), candidate(2), candidate(3, "green")]
    candidates = [replace(c, logprob=p) for c, p in zip(candidates, (-2.0, -5.0, -3.0, -4.0), strict=True)]
    settings = LOOSE.replace(pairing="gold", pairs_per_sample=2)
    pairs, funnel = run(candidates, [row(candidates, [0.9, 0.1, 0.2, 0.8])], settings)
    assert [(p.extra["chosen_id"], p.extra["rejected_id"], p.confidence) for p in pairs] == [
        ("s/2", "s/0", 1.0),
        ("s/2", "s/3", 1.0),
    ]
    wrong = [candidate(0, "blue"), candidate(1, "green")]
    assert run(wrong, [], settings)[1]["dropped"]["same_correctness"] == 1


def test_true_rationales_go_against_the_likeliest_candidates_in_the_candidates_form():
    true = replace(sample(), rationale="There is a red star. It is the only star.")
    candidates = [replace(candidate(0), logprob=-3.0), replace(candidate(1, "blue"), logprob=-1.0)]
    settings = LOOSE.replace(pairing="true")
    [pair], _ = run(candidates, [], settings, samples=[true])
    text = "<see> There is a red star. </see> <think> It is the only star. </think> <answer> red </answer>"
    assert (pair.chosen, pair.rejected, pair.confidence) == (text, candidates[1].text, 1.0)
    assert (pair.extra["chosen_right"], pair.extra["rejected_right"]) == (True, False)
    plain = [candidate(n, text=f"Thing {n} is red. So it is. Answer: red") for n in range(2)]
    [pair], _ = run(plain, [], settings, samples=[true])
    assert pair.chosen == "There is a red star. It is the only star. Answer: red"
    assert run(candidates, [], settings)[1]["dropped"]["no_true_rationale"] == 1
    same = [replace(candidate(0, text=text), logprob=-1.0), candidates[1]]
    [pair], _ = run(same, [], settings, samples=[true])
    assert (pair.chosen, pair.rejected) == (
        text,
        candidates[1].text,
    )  # what the model writes word for word is true as well
    # Lengths are compared in words where one of two has no token ids: 19 words against 14, though the other has 100 tokens.
    long = [replace(c, token_ids=tuple(range(100))) for c in candidates]
    assert len(run(long, [], settings.replace(max_length_ratio=1.5), samples=[true])[0]) == 1


def test_random_pairing_depends_on_seed_and_sample_alone():
    own = [candidate(i) for i in range(6)]
    settings = CurationConfig(pairing="random")

    def draw(seed, samples=None):
        pairs, _ = run(own, [], settings, seed, samples)
        return pairs[0].extra["chosen_id"], pairs[0].extra["rejected_id"]

    assert draw(1) == draw(1) == draw(1, [sample("other"), sample()])
    assert len({draw(seed) for seed in range(40)}) > 10
    assert all(a != b for a, b in (draw(seed) for seed in range(40)))


def test_the_shift_by_order_is_the_mean_of_p_less_a_half_over_compared_pairs():
    a = [candidate(i, text=text, sample_id="a") for i, text in enumerate(["It is. Answer: a", "It is. Answer: a", "b"])]
    b = [candidate(i, sample_id="b") for i in range(3)]
    half = [0.5] * 3
    # Of a, whose first two texts are equal, (0, 2) alone counts: 0.9 and 0.4. Of b (1, 2) was not compared.
    of_a = [[0.5, 0.5, 0.9], [0.5, 0.5, 0.9], [0.4, 0.4, 0.5]]
    of_b = [[0.5, 0.6, 0.7], [0.8, 0.5, 0.5], [0.2, 0.5, 0.5]]
    rows = [row(a, half, 0.5, pairs=1) | {"raw": of_a}, row(b, half, 0.5, pairs=2) | {"raw": of_b}]
    _, funnel = curate([sample("a"), sample("b")], {"a": a, "b": b}, rows, LOOSE)
    assert funnel["order_shift"] == pytest.approx((0.4 - 0.1 + 0.1 + 0.2 + 0.3 - 0.3) / 6)
    without = row(a, half, 0.5)
    del without["raw"]
    for each in (without, without | {"raw": half}):  # of another scorer, and of candidates that were each rated alone
        _, funnel = curate([sample("a")], {"a": a}, [each], LOOSE)
        assert funnel["order_shift"] is None


def test_rates_are_weighted_by_pairs_and_histograms_count_everything():
    a = [candidate(i, sample_id="a") for i in range(3)]
    b = [candidate(i, sample_id="b") for i in range(2)]
    rows = [
        row(a, [0.0, 0.5, 1.0], 0.5, flip_rate=1 / 3, tie_rate=0.5),
        row(b, [0.2, 0.8], 1.0, flip_rate=1.0, tie_rate=0.0),
    ]
    _, funnel = curate([sample("a"), sample("b")], {"a": a, "b": b}, rows, LOOSE)
    assert funnel["order_flip_rate"] == pytest.approx((1 + 1) / 4)
    assert funnel["tie_rate"] == pytest.approx(3 / 8)
    assert funnel["mean_confidence"] == pytest.approx((3 * 0.5 + 1.0) / 4)
    assert len(funnel["score_histogram"]["counts"]) == 20 and len(funnel["score_histogram"]["edges"]) == 21
    assert sum(funnel["score_histogram"]["counts"]) == 5 and sum(funnel["confidence_histogram"]["counts"]) == 4
    assert funnel["confidence_histogram"]["counts"][19] == 1  # a confidence of exactly 1 is in the last bin
    assert funnel["length_correlation"] is None  # all of one length


def test_length_correlation_looks_within_samples():
    a = [candidate(i, sample_id="a", tokens=n) for i, n in enumerate((10, 20, 30))]
    b = [candidate(i, sample_id="b", tokens=n) for i, n in enumerate((110, 120))]
    rows = [row(a, [0.7, 0.8, 0.9]), row(b, [0.1, 0.2])]  # longer is better within each, worse across the two
    _, funnel = curate([sample("a"), sample("b")], {"a": a, "b": b}, rows, LOOSE)
    assert funnel["length_correlation"] == pytest.approx(1.0)


def test_scores_of_other_candidates_are_refused():
    own = [candidate(0), candidate(1)]
    with pytest.raises(InputError, match="candidate_ids"):
        run(own, [row(own, [0.1, 0.9]) | {"candidate_ids": ["x", "y"]}])


@pytest.mark.parametrize(
    "wrong", [{"min_margin": -0.1}, {"pairs_per_sample": 0}, {"max_length_ratio": 0.5}, {"pairing": "best"}]
)
def test_settings_out_of_bounds_are_refused_by_name(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        CurationConfig(**wrong)


def test_disjoint_pairs_leave_the_middle_one_of_an_odd_number_out():
    own = [candidate(i) for i in range(5)]
    settings = LOOSE.replace(pairs_per_sample=9, pair_choice="disjoint")
    pairs, funnel = run(own, [row(own, [0.5, 0.9, 0.1, 0.7, 0.3])], settings)
    assert [(p.extra["chosen_id"], p.extra["rejected_id"]) for p in pairs] == [("s/1", "s/2"), ("s/3", "s/4")]
    assert funnel["pairs_proposed"] == 2 and not any(funnel["dropped"].values())


@pytest.mark.parametrize("choice", ["best_against_worst", "disjoint"])
def test_of_equal_scores_the_earlier_candidate_ranks_first(choice):
    own = [candidate(i) for i in range(4)]
    settings = LOOSE.replace(pairs_per_sample=2, pair_choice=choice)
    pairs, _ = run(own, [row(own, [0.5, 0.5, 0.5, 0.5])], settings)
    second = {"best_against_worst": ("s/0", "s/2"), "disjoint": ("s/1", "s/2")}[choice]
    assert [(p.extra["chosen_id"], p.extra["rejected_id"]) for p in pairs] == [("s/0", "s/3"), second]


def test_draws_of_the_baselines_are_those_of_seed_and_sample():
    """Literal: `random.Random("SEED/ID")`, so that a stopped run and one of other samples draw the same."""
    settings = LOOSE.replace(pairing="random", pairs_per_sample=2)
    drawn = set()
    for name in ("a", "b", "c", "d"):
        own = [candidate(i, sample_id=name) for i in range(5)]
        pairs, _ = curate([sample(name)], {name: own}, [], settings, 3)
        order = random.Random(f"3/{name}").sample(range(5), 5)
        expected = [(f"{name}/{order[0]}", f"{name}/{order[1]}"), (f"{name}/{order[2]}", f"{name}/{order[3]}")]
        assert [(p.extra["chosen_id"], p.extra["rejected_id"]) for p in pairs] == expected
        drawn.add(tuple(order))
    assert len(drawn) == 4
    settings = LOOSE.replace(pairing="answer", pairs_per_sample=2)
    own = [candidate(0, "red"), candidate(1, "blue"), candidate(2, "red"), candidate(3, "green")]
    pairs, _ = run(own, [], settings, 7)
    expected = random.Random("7/s").sample([(0, 1), (0, 3), (2, 1), (2, 3)], 2)
    assert [(p.extra["chosen_id"], p.extra["rejected_id"]) for p in pairs] == [
        (f"s/{a}", f"s/{b}") for a, b in expected
    ]


MODES = pairwise_cases(
    {
        "pairing": ("score", "random", "answer"),
        "weighting": ("confidence", "none"),
        "pair_choice": ("best_against_worst", "disjoint"),
        "pairs_per_sample": (1, 2, 9),
        "min_margin": (0.0, 0.25),
        "min_confidence": (0.0, 0.5),
        "min_rating": (0.0, 0.5),
        "max_length_ratio": (1.5, 100.0),
    },
    seed=3,
)


@pytest.mark.parametrize("case", MODES, ids=lambda case: "-".join(map(str, case.values())))
def test_modes_in_combination_are_those_of_a_plain_loop(case):
    """Scores, confidences and ratings of eighths, so that many lie on a threshold."""
    rng = np.random.default_rng(11)
    samples, candidates, rows = [], {}, []
    for number in range(30):
        name = f"s{number}"
        own = [
            candidate(i, str(rng.choice(["red", "blue"])), tokens=int(rng.integers(4, 13)), sample_id=name)
            for i in range(rng.integers(2, 6))
        ]
        n = len(own)
        confidence = rng.integers(0, 9, (n, n)) / 8
        alone = (rng.integers(0, 9, n) / 8).tolist()
        rows.append(row(own, (rng.integers(0, 9, n) / 8).tolist(), np.maximum(confidence, confidence.T), alone=alone))
        samples.append(sample(name))
        candidates[name] = own
    pairs, funnel = curate(samples, candidates, rows, CurationConfig(**case), 5)
    expected = []
    dropped = Counter()
    for one, scored in zip(samples, rows, strict=True):
        own, scores = candidates[one.id], scored["scores"]
        draws = random.Random(f"5/{one.id}")
        ranked = sorted(range(len(own)), key=lambda i: (-scores[i], i))
        if case["pairing"] == "random":
            order = draws.sample(range(len(own)), len(own))
            proposed = [(order[k], order[k + 1]) for k in range(0, len(own) - 1, 2)]
        elif case["pairing"] == "answer":
            right = [i for i in range(len(own)) if own[i].answer == "red"]
            wrong = [i for i in range(len(own)) if own[i].answer == "blue"]
            crossed = [(i, j) for i in right for j in wrong]
            proposed = draws.sample(crossed, min(case["pairs_per_sample"], len(crossed)))
            dropped["same_correctness"] += not crossed
        elif case["pair_choice"] == "disjoint":
            proposed = [(ranked[k], ranked[-1 - k]) for k in range(len(own) // 2)]
        else:
            proposed = [(ranked[0], ranked[-1 - k]) for k in range(len(own) - 1)]
        for i, j in proposed[: case["pairs_per_sample"]]:
            sure = scored["confidence"][i][j]
            lengths = sorted((len(own[i].token_ids), len(own[j].token_ids)))
            reasons = []
            if case["pairing"] == "score":
                reasons += ["margin"] * (scores[i] - scores[j] < case["min_margin"])
                reasons += ["confidence"] * (sure < case["min_confidence"] or sure == 0)
                reasons += ["rating"] * (scored["alone"][i] < case["min_rating"])
            reasons += ["length"] * (lengths[1] > case["max_length_ratio"] * lengths[0])
            if reasons:
                dropped[reasons[0]] += 1
                continue
            weighted = case["pairing"] == "score" and case["weighting"] == "confidence"
            expected.append((own[i].id, own[j].id, sure if weighted else 1.0, sure))
    found = [(p.extra["chosen_id"], p.extra["rejected_id"], p.confidence, p.judge_confidence) for p in pairs]
    assert found == expected
    assert {reason: count for reason, count in funnel["dropped"].items() if count} == +dropped
    assert funnel["kept"] == len(expected) and funnel["pairs_proposed"] == len(expected) + sum(
        count for reason, count in dropped.items() if reason != "same_correctness"
    )


def test_shares_of_pairs_by_correctness_and_their_mean_confidence_are_literal():
    kinds = [
        ("red", "blue"),
        ("red", "blue"),
        ("red", "blue"),
        ("red", "red"),
        ("blue", "blue"),
        ("blue", "red"),
        ("blue", "red"),
    ]
    samples, candidates, rows = [], {}, []
    for number, answers in enumerate(kinds):
        name = f"s{number}"
        own = [candidate(k, answer, sample_id=name) for k, answer in enumerate(answers)]
        rows.append(row(own, [0.9, 0.1], (number + 1) / 8))
        samples.append(sample(name))
        candidates[name] = own
    _, funnel = curate(samples, candidates, rows, LOOSE, 0)
    assert funnel["pair_correctness"] == pytest.approx(
        {"right_over_wrong": 3 / 7, "right_over_right": 1 / 7, "wrong_over_wrong": 1 / 7, "wrong_over_right": 2 / 7}
    )
    assert funnel["mean_kept_confidence"] == pytest.approx(4 / 8)
    kept = [{"confidence": 1.0}, {"confidence": 0.125}, {"confidence": 0.125}]
    _, funnel = curate(
        samples[:3],
        candidates,
        [row(candidates[f"s{k}"], [0.9, 0.1], one["confidence"]) for k, one in enumerate(kept)],
        LOOSE,
    )
    assert funnel["mean_kept_confidence"] == pytest.approx(1.25 / 3)  # a mean, no median


def test_what_was_not_compared_is_no_measurement():
    """Of four candidates' six pairs one was compared: its confidence is the mean, and the histogram's only one."""
    own = [candidate(i) for i in range(4)]
    confidence = np.zeros((4, 4))
    confidence[0, 3] = confidence[3, 0] = 0.8
    rows = [row(own, [0.9, 0.5, 0.5, 0.1], confidence, pairs=1, verdicts=2)]
    _, funnel = run(own, rows)
    assert funnel["mean_confidence"] == pytest.approx(0.8)
    assert funnel["confidence_histogram"]["counts"] == [0] * 16 + [1] + [0] * 3
    assert sum(funnel["score_histogram"]["counts"]) == 4


def test_lengths_are_of_tokens_and_of_words_where_there_are_none():
    own = [candidate(0, text="<see> A b c. </see> <answer> red </answer>", tokens=10), candidate(1, tokens=21)]
    settings = LOOSE.replace(max_length_ratio=2.0)
    assert run(own, [row(own, [0.9, 0.1])], settings)[1]["dropped"]["length"] == 1
    own = [replace(one, token_ids=()) for one in own]  # 8 words against 13
    assert run(own, [row(own, [0.9, 0.1])], settings)[1]["dropped"]["length"] == 0
    assert run(own, [row(own, [0.9, 0.1])], settings.replace(max_length_ratio=1.5))[1]["dropped"]["length"] == 1
