"""The figures of an evaluation and of the headroom are shares over all samples, though they are counted as these pass by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from srcfast.data.in_order import InOrder
from srcfast.data.records import Candidate, Sample
from srcfast.stages.evaluation import Counts, Prediction, bootstrap_interval, predict, summarise
from srcfast.stages.headroom import aligned, headroom_samples, measure_headroom, with_next
from srcfast.stages.rationale import build_raps
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
        {"sample_id": name, "scores": scores.tolist(), "win_probability": wins.tolist()}
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


def test_what_is_recovered_is_a_share_of_the_gap() -> None:
    after = [True, True, False, False]
    assert with_next({"pass_at_1": 0.25, "best_of_n": 0.75}, after)["recovered"] == 0.5
    assert with_next({"pass_at_1": 0.5, "best_of_n": 0.5}, after) == {
        "pass_at_1": 0.5,
        "best_of_n": 0.5,
        "next_pass_at_1": 0.5,
        "recovered": None,
    }
