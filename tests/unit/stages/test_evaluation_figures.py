"""The figures of an evaluation and of the headroom are shares over all samples, though they are counted as these pass by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from srcfast.data.in_order import InOrder
from srcfast.data.rationale_pairs import build_raps
from srcfast.data.records import Candidate, Sample
from srcfast.stages.evaluation import Counts, Prediction, bootstrap_interval, predict, summarise
from srcfast.stages.headroom import aligned, headroom_samples, measure_headroom, with_next
from srcfast.world.samples import world_samples

SEED = {"resamples": 50, "seed": 3}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return world_samples("test", 60, 0, image_dir=tmp_path_factory.mktemp("images"))


@pytest.fixture
def respond(samples: list[Sample], rng: np.random.Generator) -> Callable[[Sample], str]:
    """A right, a wrong, an unaligned or an unreadable response."""
    right = {sample.id: text for sample, text in build_raps(samples, "tagged")[0]}

    def response(sample: Sample) -> str:
        bad = "<see> There is a red circle. </see> <answer> {} </answer>"
        texts = (right[sample.id], bad.format(sample.answer), bad.format("nothing"), "no idea what that may be at all")
        return texts[rng.integers(len(texts))]

    return response


def summary(predictions: list[Prediction]) -> dict[str, Any]:
    counts = Counts()
    assert list(counts.counted(iter(predictions))) == predictions
    return summarise(counts, model="m", dataset="d", split="s", **SEED)


def test_figures_are_means_over_samples_with_their_bootstrap_intervals(
    samples: list[Sample], respond: Callable[[Sample], str]
) -> None:
    asked = [replace(s, extra={"ability": "plain"}) if number % 3 == 0 else s for number, s in enumerate(samples)]
    made = [predict(sample, respond(sample)) for sample in asked]
    judged = [one.judgement for one in made if one.judgement is not None]
    assert len(judged) == 40
    entry = summary(made)
    values = {
        "accuracy": [one.right for one in made],
        "alignment": [one.aligned for one in judged],
        "rationale_accuracy": [one.rationale_right for one in judged],
    }
    for name, own in values.items():  # 0 and 1 add up without rounding
        assert entry[name] == np.mean(own)
        assert entry[f"{name}_ci95"] == bootstrap_interval(np.array(own, dtype=float), **SEED)
    assert entry["perception_accuracy"] == np.mean([one.perception_right for one in judged])
    assert entry["reasoning_accuracy"] == np.mean([one.reasoning_right for one in judged])
    assert entry["n"] == 60 and entry["unparsed"] == sum(one.answer is None for one in made)
    assert sum(entry["cases"].values()) == 40
    plain = [one.right for one in made if one.judgement is None]
    assert entry["by_ability"]["plain"] == {"n": 20, "accuracy": np.mean(plain), "alignment": None}
    assert sum(group["n"] for group in entry["by_ability"].values()) == 60


def test_without_a_scene_no_figure_of_rationales_is_made_up(samples: list[Sample]) -> None:
    entry = summary([predict(replace(sample, extra={}), f"Answer: {sample.answer}") for sample in samples])
    assert entry["accuracy"] == 1.0 and entry["accuracy_ci95"] == [1.0, 1.0]
    assert entry["alignment"] is entry["rationale_accuracy"] is entry["right_answer_wrong_rationale"] is None


def test_headroom_is_the_share_of_samples_whose_candidates_or_first_ranked_one_are_aligned(
    samples: list[Sample], respond: Callable[[Sample], str], rng: np.random.Generator
) -> None:
    chosen = headroom_samples([replace(samples[0], extra={}), *samples], 40)
    assert chosen == samples[:40]
    texts = {sample.id: [respond(sample) for _ in range(int(rng.integers(5)))] for sample in chosen}  # some have none
    rows = {name: (rng.random(len(own)), rng.random((len(own), len(own)))) for name, own in texts.items() if own}
    greedy = [bool(rng.integers(2)) for _ in chosen]
    candidates = (
        (n, [Candidate(f"{n}/{k}", n, t, "", "", -1.0) for k, t in enumerate(o)]) for n, o in texts.items() if o
    )
    scored = (
        {
            "sample_id": name,
            "scores": scores.tolist(),
            "win_probability": wins.tolist(),
            "raw": wins.tolist(),
            "verdicts": 3,
        }
        for name, (scores, wins) in rows.items()
    )
    entry = measure_headroom(chosen, greedy, InOrder(candidates), scored)
    good = {sample.id: np.array([aligned(sample, text) for text in texts[sample.id]], dtype=bool) for sample in chosen}
    assert entry["pass_at_1"] == np.mean(greedy)
    assert entry["pass_at_n"] == np.mean([own.any() for own in good.values()])
    assert entry["best_of_n"] == sum(good[name][scores.argmax()] for name, (scores, _) in rows.items()) / 40
    assert entry["n_candidates"] == np.mean([len(own) for own in texts.values()])
    verdicts = np.concatenate([wins[np.ix_(good[name], ~good[name])].ravel() > 0.5 for name, (_, wins) in rows.items()])
    assert entry["scorer_oracle_agreement"] == verdicts.mean() and 0 < len(verdicts)
    assert entry["comparisons"] == 3 * len(rows)


def test_what_is_recovered_is_a_share_of_the_gap() -> None:
    after = [True, True, False, False]
    assert with_next({"pass_at_1": 0.25, "best_of_n": 0.75}, after)["recovered"] == 0.5
    assert with_next({"pass_at_1": 0.5, "best_of_n": 0.5}, after) == {
        "pass_at_1": 0.5,
        "best_of_n": 0.5,
        "next_pass_at_1": 0.5,
        "recovered": None,
    }


# By literal values: what counts as right, and where the intervals end --------------------------------------------------

RIGHT = [
    ("red", "<see> It is red. </see> <answer> red </answer>", "red", True),
    ("red", "Answer: Red.", "Red.", True),
    ("2", "Answer: two", "two", True),
    ("red", "Answer: the red", "the red", True),
    ("red", "Answer: dark red", "dark red", False),
    ("dark red", "Answer: red", "red", False),
    ("no", "Answer: not one", "not one", False),
    ("yes", "yesterday", "yesterday", False),
    ("red", "I see it and it is clearly red there", None, False),  # more words than a bare answer has
    ("red", "<answer> red", None, False),
    (".", "no idea what that may be at all", None, False),  # a gold answer of which nothing is left
    ("", "<see> It is red. </see>", None, False),
]


@pytest.mark.parametrize(("gold", "text", "answer", "right"), RIGHT)
def test_a_response_is_right_only_if_its_parsed_answer_is_the_whole_gold_answer(
    gold: str, text: str, answer: str | None, right: bool
) -> None:
    prediction = predict(Sample("s", (), "What?", gold), text)
    assert (prediction.answer, prediction.right) == (answer, right)


def test_the_counts_of_unparsed_and_right_responses_are_literal_ones() -> None:
    entry = summary([predict(Sample(str(k), (), "What?", gold), text) for k, (gold, text, *_) in enumerate(RIGHT)])
    assert (entry["n"], entry["unparsed"], entry["accuracy"]) == (12, 4, 4 / 12)


def binomial_quantile(n: int, share: float, level: float) -> int:
    """The smallest number of hits whose cumulative probability is at least `level`."""
    cumulative, hits = 0.0, -1
    while cumulative < level:
        hits += 1
        cumulative += math.comb(n, hits) * share**hits * (1 - share) ** (n - hits)
    return hits


@pytest.mark.parametrize(("n", "hits"), [(400, 100), (250, 225), (90, 3)])
def test_an_interval_holds_the_middle_95_percent_of_the_resampled_shares(n: int, hits: int) -> None:
    """A resample's hits are binomial. With 20,000 its quantiles are at most a hit away; those of 90 % are further."""
    values = np.zeros(n)
    values[:hits] = 1.0
    low, high = bootstrap_interval(values, 20_000, seed=1)
    assert low * n == pytest.approx(binomial_quantile(n, hits / n, 0.025), abs=1.0)
    assert high * n == pytest.approx(binomial_quantile(n, hits / n, 0.975), abs=1.0)
    counts = Counts()
    for k in range(n):
        counts.add(predict(Sample(str(k), (), "What?", "red"), "red" if k < hits else "blue"))
    entry = summarise(counts, model="m", dataset="d", split="s", resamples=20_000, seed=1)
    assert entry["accuracy"] == hits / n and entry["accuracy_ci95"] == [low, high]


def test_an_interval_of_few_resamples_is_interpolated_between_their_sorted_means() -> None:
    values, seed = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 0.25, 0.25]), 8
    rng = np.random.default_rng(seed)
    drawn = [rng.multinomial(7, [2 / 7, 2 / 7, 3 / 7]) for _ in range(30)]  # how often 0, 1/4 and 1 are drawn
    means = sorted((0.25 * quarters + ones) / 7 for _, quarters, ones in drawn)
    ends = []
    for level in (0.025, 0.975):
        whole, part = divmod(level * 29, 1)
        ends.append((1 - part) * means[int(whole)] + part * means[int(whole) + 1])
    assert bootstrap_interval(values, 30, seed) == pytest.approx(ends, abs=1e-12)


def test_figures_of_rationales_are_shares_of_the_verified_samples_alone(samples: list[Sample]) -> None:
    """Of 8 samples 5 can be verified: literal shares."""
    texts = {sample.id: text for sample, text in build_raps(samples, "tagged")[0]}
    wrong_rationale = "<see> There is a red circle. There is no object. </see> <answer> {} </answer>"
    verified = [texts[sample.id] for sample in samples[:3]] + [wrong_rationale.format(s.answer) for s in samples[3:5]]
    made = [predict(sample, text) for sample, text in zip(samples, verified, strict=False)]
    made += [predict(replace(sample, extra={}), texts[sample.id]) for sample in samples[5:8]]
    entry = summary(made)
    assert entry["n"] == 8 and entry["accuracy"] == 1.0
    assert entry["alignment"] == entry["rationale_accuracy"] == 3 / 5
    assert entry["right_answer_wrong_rationale"] == 2 / 5
    assert entry["cases"] == {
        "both_right": 3,
        "right_answer_wrong_rationale": 2,
        "right_rationale_wrong_answer": 0,
        "both_wrong": 0,
    }


def test_headroom_of_literal_candidates(samples: list[Sample]) -> None:
    """A win probability of 1/2 agrees with nobody, unless it stands for no comparison; of equal scores the first counts; a
    sample without a row has no pick."""
    texts = {sample.id: text for sample, text in build_raps(samples, "tagged")[0]}
    bad = "<see> There is a red circle. There is no object. </see> <answer> red </answer>"
    groups = {  # (good?, score) of each candidate
        0: [(True, 0.9), (False, 0.2)],
        1: [(False, 0.5), (True, 0.5)],
        2: [(True, 0.3), (False, 0.7), (False, 0.3)],
        3: [(False, 0.4)],
        4: [(True, 0.6)],  # without a row
        5: [(True, 0.6), (False, 0.5), (False, 0.4)],
    }
    wins = {
        0: [[0.5, 0.8], [0.2, 0.5]],  # agrees
        1: [[0.5, 0.5], [0.5, 0.5]],  # neutral
        2: [[0.5, 0.1, 0.51], [0.9, 0.5, 0.5], [0.49, 0.5, 0.5]],  # disagrees, agrees
        3: [[0.5]],
        5: [[0.5, 0.5, 0.9], [0.5, 0.5, 0.5], [0.1, 0.5, 0.5]],  # agrees; the second one was compared with none
    }
    raw = wins | {1: [[0.5, 0.7], [0.7, 0.5]]}  # the second in either order: neutral
    chosen = samples[:6]
    candidates = {
        chosen[k].id: [
            Candidate(f"{k}/{i}", chosen[k].id, texts[chosen[k].id] if good else bad, "", "", -1.0)
            for i, (good, _) in enumerate(group)
        ]
        for k, group in groups.items()
    }
    assert [aligned(chosen[k], candidates[chosen[k].id][0].text) for k in groups] == [
        True,
        False,
        True,
        False,
        True,
        True,
    ]
    rows = [
        {
            "sample_id": chosen[k].id,
            "scores": [score for _, score in groups[k]],
            "win_probability": wins[k],
            "raw": raw[k],
            "verdicts": 2,
        }
        for k in wins
    ]
    entry = measure_headroom(chosen, [True, False, False, False, True, False], candidates, rows)
    assert entry == {
        "n": 6,
        "n_candidates": 12 / 6,
        "pass_at_1": 2 / 6,
        "pass_at_n": 5 / 6,
        "best_of_n": 2 / 6,
        "scorer_oracle_agreement": 3 / 5,
        "comparisons": 10,
    }
    assert measure_headroom(chosen, [False] * 6, candidates, rows[3:4])["scorer_oracle_agreement"] is None
    rated = [{**row, "raw": row["scores"]} for row in rows]  # each alone: no pair is left out
    entry = measure_headroom(chosen, [False] * 6, candidates, rated)
    assert entry["scorer_oracle_agreement"] == 3 / 6


def test_figures_by_ability_and_by_kind_of_claim_are_counted_one_by_one(samples: list[Sample]) -> None:
    """Of each ability some samples can't be verified; some rationales see right and reason wrong."""
    texts = {sample.id: text for sample, text in build_raps(samples, "tagged")[0]}
    made = []
    for number, sample in enumerate(samples):
        text = texts[sample.id]
        if number % 4 == 1:
            text = (
                text.replace("<answer>", "<think> There are 9 circles. </think> <answer>")
                if "<think>" not in text
                else (text.replace("</think>", "There are 9 circles. </think>"))
            )
        elif number % 4 == 2:
            text = text.replace("<see>", "<see> There is a large teal star.")
        if number % 5 == 0:
            sample = replace(sample, extra={"ability": sample.extra["ability"]})
        made.append(predict(sample, text))
    entry = summary(made)
    judged = [one.judgement for one in made if one.judgement is not None]
    figures = {"perception_accuracy": "perception_right", "reasoning_accuracy": "reasoning_right"}
    shares = {name: sum(getattr(one, field) for one in judged) / len(judged) for name, field in figures.items()}
    assert {name: entry[name] for name in figures} == pytest.approx(shares)
    assert abs(shares["perception_accuracy"] - shares["reasoning_accuracy"]) > 0.01
    for ability, group in entry["by_ability"].items():
        own = [one for one in made if one.sample.extra["ability"] == ability]
        aligned_of = [one.judgement.aligned for one in own if one.judgement is not None]
        assert 0 < len(aligned_of) < len(own) == group["n"]
        assert group["accuracy"] == pytest.approx(sum(one.right for one in own) / len(own))
        assert group["alignment"] == pytest.approx(sum(aligned_of) / len(aligned_of))
    assert len(entry["by_ability"]) == 6


def test_headroom_is_measured_on_the_first_samples_that_have_a_scene_and_a_program(samples: list[Sample]) -> None:
    def without(sample: Sample, name: str) -> Sample:
        return replace(sample, extra={key: value for key, value in sample.extra.items() if key != name})

    mixed = [without(samples[0], "program"), samples[1], without(samples[2], "scene"), *samples[3:6]]
    assert headroom_samples(mixed, 3) == [samples[1], samples[3], samples[4]]
    assert headroom_samples(mixed, 9) == [samples[1], *samples[3:6]]
