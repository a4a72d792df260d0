"""Degraded references: what a judge sees is worse by a known amount, and what the oracle sees is not."""

import re
from pathlib import Path

import pytest

from srcfast.config.load import load_config
from srcfast.data.records import Sample
from srcfast.errors import InputError
from srcfast.stages.datasets import read_evaluation_sets, read_training_samples
from srcfast.world.degraded_references import degrade_reference
from srcfast.world.oracle import is_true
from srcfast.world.samples import world_samples
from srcfast.world.scenes import COLORS, PLACES, SHAPES, SIZES, Object, Scene

SEEN = ("There is a small red star at the top.", "There is a large blue circle at the left.", "There are 2 objects.")
SAMPLE = Sample("s", ("a.png",), "What?", "red", "<see> A red star. </see> <think> It is red. </think>", SEEN)
WORDS = (COLORS, SHAPES, SIZES, PLACES, tuple("012345"))


def drawn(sample: Sample, quality: str, seeds: int = 60) -> list[Sample]:
    return [degrade_reference(sample, quality, seed) for seed in range(seeds)]  # type: ignore[arg-type]


def test_complete_references_stay_and_answers_stand_alone() -> None:
    assert degrade_reference(SAMPLE, "complete", 3) is SAMPLE
    alone = degrade_reference(SAMPLE, "answer", 3)
    assert (alone.facts, alone.rationale, alone.answer, alone.question) == ((), None, "red", "What?")


def test_a_noisy_reference_has_one_word_of_one_fact_wrong() -> None:
    phrases = sorted((word for words in WORDS for word in words), key=len, reverse=True)
    split = re.compile(rf"\b({'|'.join(phrases)})\b")
    changed = set()
    for found in drawn(SAMPLE, "noisy"):
        assert found.rationale is None and len(found.facts) == 3
        [(before, after)] = [pair for pair in zip(SEEN, found.facts, strict=True) if pair[0] != pair[1]]
        [(old, new)] = [p for p in zip(split.split(before), split.split(after), strict=True) if p[0] != p[1]]
        assert any(old in words and new in words for words in WORDS)
        changed.add(old)
    assert changed == {"small", "red", "star", "top", "large", "blue", "circle", "left", "2"}


def test_a_partial_reference_has_half_of_the_facts_in_their_order() -> None:
    subsets = {found.facts for found in drawn(SAMPLE, "partial")}
    singles, pairs = {(fact,) for fact in SEEN}, {(SEEN[0], SEEN[1]), (SEEN[0], SEEN[2]), (SEEN[1], SEEN[2])}
    assert subsets == singles | pairs  # of three facts one or two stay
    four = Sample("s", (), "What?", "red", None, (*SEEN, "The background is plain."))
    assert {len(found.facts) for found in drawn(four, "partial")} == {2}
    one = Sample("s", (), "What?", "red", "It is red.", SEEN[:1])
    assert {found.facts for found in drawn(one, "partial")} == {(), SEEN[:1]}
    assert {found.rationale for found in drawn(one, "partial")} == {None}  # it would tell what was left out


def test_without_facts_the_rationale_is_degraded() -> None:
    bare = Sample("s", (), "What?", "red", SAMPLE.rationale)
    assert {found.rationale for found in drawn(bare, "partial")} == {"A red star.", "It is red."}
    assert degrade_reference(bare, "answer", 0).rationale is None
    noisy = {found.rationale for found in drawn(bare, "noisy")}
    assert all(re.fullmatch(r"A \w+ \w+\. It is \w+\.", str(text)) for text in noisy) and len(noisy) > 5
    assert "A red star. It is red." not in noisy
    nothing = Sample("s", (), "What?", "red")
    assert [degrade_reference(nothing, quality, 0) for quality in ("noisy", "partial", "answer")] == [nothing] * 3


def test_other_domains_have_a_word_of_their_vocabulary_or_a_number_wrong() -> None:
    chart = Sample("s", (), "What?", "7", None, ("Japan had 74 in 1990.",))
    found = {one.facts[0] for one in drawn(chart, "noisy", 200)}
    assert found == {f"Japan had {d}4 in 1990." for d in "12345689"} | {f"Japan had 74 in {d}990." for d in "23456789"}
    named = degrade_reference(chart, "noisy", 0, {"country": ("japan", "peru")})
    assert named.facts == ("Peru had 74 in 1990.",)
    with pytest.raises(InputError, match=r"scorer_training\.vocabulary"):
        degrade_reference(Sample("s", (), "What?", "tea", None, ("A man sits.",)), "noisy", 0)


def test_a_detail_is_wrong_by_the_oracle_not_only_another_word() -> None:
    """Of an image without a brown object "There is no red object." would be true, or at least not known to be false."""
    scene = Scene((Object("circle", None),), None, (Object(color="brown"), Object(color="blue")))
    facts = ("There is a circle.", "There is no brown object.", "There is no blue object.")
    extra = {"scene": scene.to_json(), "program": {"op": "query", "attribute": "shape", "of": {}}}
    sample = Sample("s", (), "What shape?", "circle", None, facts, extra)
    found = {one.facts for one in drawn(sample, "noisy")}
    assert found == {(f"There is a {shape}.", *facts[1:]) for shape in ("rectangle", "triangle", "star", "cross")}
    unknown = Sample("s", (), "What shape?", "circle", None, facts)  # without an oracle any word will do
    assert any(one.facts[0] == facts[0] for one in drawn(unknown, "noisy"))


def test_the_draw_is_the_seed_s_and_the_sample_s() -> None:
    other = Sample("t", (), "What?", "red", None, SEEN)
    for quality in ("noisy", "partial"):
        assert drawn(SAMPLE, quality) == drawn(SAMPLE, quality)
        facts = [[found.facts for found in drawn(sample, quality)] for sample in (SAMPLE, other)]
        assert facts[0] != facts[1] and len(set(facts[0])) > 3


def test_a_dataset_s_quality_is_for_judging_alone(tmp_path: Path) -> None:
    world = {"name": "world", "format": "world", "limit": 12, "seed": 5}
    config = load_config(
        None,
        [
            "data.train=[{name: world, format: world, limit: 12, seed: 5, reference: noisy}]",
            "data.evaluation=[{name: world, format: world, split: test, limit: 12, reference: partial}]",
        ],
    )
    truth = world_samples("train", 12, 5, image_dir=tmp_path)
    assert read_training_samples(config.data.train, config, tmp_path, [], "rationale") == truth
    judged = read_training_samples(config.data.train, config, tmp_path, [], "calibration")
    for sample, true in zip(judged, truth, strict=True):
        assert (sample.extra, sample.answer, sample.images) == (true.extra, true.answer, true.images)
        scene = Scene.from_json(sample.extra["scene"])
        assert [is_true(fact, scene) for fact in sample.facts].count(False) == 1
        assert sample.facts != true.facts and len(sample.facts) == len(true.facts)
    [test] = read_evaluation_sets(config.data.evaluation, config, tmp_path, [])
    for sample, true in zip(test.samples, world_samples("test", 12, 0, image_dir=tmp_path), strict=True):
        assert set(sample.facts) < set(true.facts) and sample.extra == true.extra
    plain = load_config(None, [f"data.train=[{{{', '.join(f'{k}: {v}' for k, v in world.items())}}}]"])
    assert read_training_samples(plain.data.train, plain, tmp_path, [], "calibration") == truth
    assert "reference" not in plain.identity()["data"]["train"][0]  # runs that began without the setting continue
    assert config.identity()["data"]["train"][0]["reference"] == "noisy"
    assert "reference" not in plain.identity()["scorer"] and "qualities" not in plain.identity()["scorer_training"]
