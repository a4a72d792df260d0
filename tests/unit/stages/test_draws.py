"""Which samples a set and a round draw, by literal seeds: a continued run must draw what it drew before."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest

from srcfast.config.datasets import DatasetConfig
from srcfast.data.records import Candidate, Sample
from srcfast.stages.candidates import diversity
from srcfast.stages.datasets import draw, draw_round, read_dataset

SAMPLES = [Sample(f"s{number}", (), "What?", "red") for number in range(7)]


def ids(samples: list[Sample]) -> list[str]:
    return [sample.id for sample in samples]


def test_rounds_take_turns_through_one_shuffle_of_all_samples() -> None:
    shuffled = random.Random("calibration/4").sample(SAMPLES, 7)
    assert ids(draw_round(SAMPLES, 3, 1, 4)) == ids(shuffled[:3])
    assert ids(draw_round(SAMPLES, 3, 2, 4)) == ids(shuffled[3:6])
    assert ids(draw_round(SAMPLES, 3, 3, 4)) == ids([shuffled[6], *shuffled[:2]])  # all were used: the first ones again
    for count in (0, 7, 9):
        assert ids(draw_round(SAMPLES, count, 2, 4)) == ids(shuffled)


def test_a_draw_is_the_beginning_of_the_seed_s_shuffle() -> None:
    shuffled = random.Random("any seed").sample(SAMPLES, 7)
    for count in (1, 7):
        assert ids(draw(SAMPLES, count, "any seed")) == ids(shuffled[:count])
    assert ids(draw(SAMPLES, 0, "any seed")) == ids(shuffled)


@pytest.mark.parametrize("limit", [0, 3, 7, 9])
def test_a_limited_set_is_a_draw_by_its_name_and_its_seed(limit: int, tmp_path: Path) -> None:
    rows = [{"id": sample.id, "images": [], "question": "What?", "answer": "red"} for sample in SAMPLES]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, seed in (("one", 0), ("one", 1), ("other", 0)):
        dataset = DatasetConfig(
            name=name, format="jsonl", path=str(tmp_path / "data.jsonl"), limit=limit, seed=seed, check_images=False
        )
        expected = ids(SAMPLES)
        if limit == 3:
            expected = random.Random(f"{name}/{seed}").sample(expected, 3)
        assert ids(read_dataset(dataset, tmp_path, [])) == expected


@pytest.mark.parametrize("format", ["world", "digits", "charts"])
def test_a_format_that_is_drawn_gives_as_many_samples_as_are_asked_for(format: str, tmp_path: Path) -> None:
    package = {"digits": "sklearn", "charts": "statsmodels"}.get(format)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"needs {package}")
    dataset = DatasetConfig(name="some", format=format, split="validation", limit=5, seed=8)
    samples = read_dataset(dataset, tmp_path, [])
    assert [sample.id for sample in samples] == [f"{format}-validation-8-00000{number}" for number in range(5)]
    assert {sample.images[0] for sample in samples} == {path.name for path in tmp_path.iterdir()}


def test_a_dataset_without_rationales_has_neither_them_nor_facts(tmp_path: Path) -> None:
    row = {
        "id": "a",
        "images": [],
        "question": "What?",
        "answer": "red",
        "rationale": "It is red.",
        "facts": ["A red cup."],
        "x": 1,
    }
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    dataset = DatasetConfig(name="some", format="jsonl", path=str(tmp_path / "data.jsonl"))
    (given,) = read_dataset(dataset, tmp_path, [])
    assert (given.rationale, given.facts) == ("It is red.", ("A red cup.",))
    (bare,) = read_dataset(dataset.replace(rationales="none"), tmp_path, [])
    assert bare.to_json() == {"id": "a", "images": [], "question": "What?", "answer": "red", "x": 1}


def test_diversity_of_candidates_of_different_lengths() -> None:
    """Bigrams {12, 23, 34, 45} and {12, 23}: 2 of 4 in common; the third shares none with either."""
    group = [
        Candidate(f"s#{number}", "s", f"text {number}", "", answer, -1.0, tokens)
        for number, (answer, tokens) in enumerate((("a", (1, 2, 3, 4, 5)), ("a", (1, 2, 3)), ("b", (7, 8))))
    ]
    assert diversity([group, group[:1]]) == {
        "distinct_texts": 1.0,
        "distinct_answers": 2 / 3,
        "bigram_overlap": pytest.approx((0.5 + 0.0 + 0.0) / 3),
    }
    assert diversity([group[:1]]) == {}
