"""An R-Scorer goes on with a run's candidates: which are chosen, and a training of a few steps."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from srcfast.config.load import load_config
from srcfast.data.jsonl import write_shards
from srcfast.data.rationale_format import format_response
from srcfast.data.records import Candidate, Sample
from srcfast.errors import SrcfastError
from srcfast.models.scorer import ALONE, load_scorer
from srcfast.models.verdict_temperature import CALIBRATION
from srcfast.recipes import adapt_scorer as recipe
from srcfast.recipes.adapt_scorer import Adaptation, Written
from srcfast.run.directory import RunDirectory
from srcfast.stages.scorer_training import Variant
from srcfast.stages.scoring import sample_reference
from srcfast.world.samples import world_samples

QUALITIES = ("complete", "noisy", "partial", "answer")


def candidates_of(sample: Sample) -> list[Candidate]:
    """Write a sample's true rationale with the gold answer, one of its sentences with it, a wrong answer, and no rationale."""
    see, think = sample.extra["see"], sample.extra["think"]
    texts = [
        format_response(see, think, sample.answer, "tagged"),
        format_response(see, think, "nothing", "tagged"),
        format_response(("There is a small pink moon at the top.",), think, sample.answer, "tagged"),
        format_response(see, think, sample.answer, "tagged"),
        f"<answer> {sample.answer}</answer>",
    ]
    return [Candidate(f"{sample.id}#{n}", sample.id, text, "", "", -1.0) for n, text in enumerate(texts)]


@pytest.fixture
def written(tmp_path: Path) -> list[Written]:
    samples = world_samples("scorer", 12, 3, image_dir=tmp_path / "drawn")
    return [recipe.verified(sample, candidates_of(sample)) for sample in samples]


def test_distinct_candidates_are_sorted_by_what_the_oracle_finds(written: list[Written]) -> None:
    for each in written:
        texts = [candidate.text for candidate in candidates_of(each.sample)]
        assert [variant.text for variant in each.aligned] == [texts[0]] and each.aligned[0].faults == 0
        assert [(variant.text, variant.faults) for variant in each.wrong] == [(texts[1], 1)]
        assert [(variant.text, variant.faults) for variant in each.right] == [(texts[2], 1)]


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [
        ((5, 5, 5), 6, (3, 2, 1)),  # half, then half of what is left, then the rest
        ((1, 5, 5), 6, (1, 3, 2)),
        ((0, 1, 9), 4, (0, 1, 3)),
        ((5, 0, 0), 4, (4, 0, 0)),
        ((2, 9, 0), 8, (2, 6, 0)),
        ((0, 0, 2), 4, (0, 0, 2)),
    ],
)
def test_half_of_the_chosen_are_aligned_then_right_answers_come_first(
    counts: tuple[int, int, int], limit: int, expected: tuple[int, int, int]
) -> None:
    groups = [[Variant(f"{name}{n}", int(name > 0)) for n in range(count)] for name, count in enumerate(counts)]
    each = Written(Sample("a", (), "?", "yes"), *groups)
    chosen = [variant.text for variant in each.choose(limit, random.Random(5))]
    assert len(chosen) == len(set(chosen)) == sum(expected)
    assert tuple(sum(text.startswith(str(name)) for text in chosen) for name in range(3)) == expected


def test_examples_are_rated_where_they_cannot_be_compared_with_references_as_asked_for(written: list[Written]) -> None:
    rated = recipe.draw_examples(Adaptation(complete=1.0), written, "rated")
    assert len(rated) == 2 * len(written)
    references = {each.sample.id: sample_reference(each.sample) for each in written}
    for example in rated:
        assert example.pairs == tuple((n, ALONE) for n in range(3)) and example.reference == references[example.key]
    worse = Adaptation(complete=0.0, qualities=("answer",), compared=2)
    faulty, *others = [replace(written[0], aligned=[]), *written[1:]]
    compared = recipe.draw_examples(worse, [faulty, *others], "compared")
    assert [each.key for each in compared] == 2 * [each.sample.id for each in others]
    assert all({variant.faults for variant in each.variants} == {0, 1} for each in compared)
    assert all(each.reference != references[each.key] for each in compared)
    assert recipe.draw_examples(worse, [faulty, *others], "compared") == compared
    first, *mixed = recipe.draw_examples(worse, [faulty, *others], "mixed")[: len(written)]
    assert first.key == faulty.sample.id and first.pairs == ((0, ALONE), (1, ALONE))
    assert all(set(each.pairs) == {(0, 1), (1, 0), (0, ALONE), (1, ALONE)} for each in mixed)


def test_an_r_scorer_goes_on_from_a_run(tmp_path: Path) -> None:
    images = tmp_path / "runs" / "images"
    words = [f"output={tmp_path / 'runs'}", "name=writer"]
    data = "data.train=[{name: w, format: world, split: scorer, limit: 12, seed: 3, reference: partial, use: [calibration]}]"
    config = load_config(None, [*words, data])
    directory = RunDirectory(config.run_path)
    directory.write_config(config)
    samples = world_samples("scorer", 12, 3, image_dir=images)
    rows = [candidate.to_json() for sample in samples for candidate in candidates_of(sample)]
    write_shards(directory.iteration(1) / "candidates", rows)

    written = recipe.read_run(config.run_path)
    assert [each.sample.facts for each in written] == [
        sample.facts for sample in samples
    ]  # complete, whatever the run's
    output, small = tmp_path / "adapted", Adaptation(passes=(1, 1, 1))
    recipe.adapt_scorer(small, "embedded", written, output)
    record = json.loads((output / "TRAINING.json").read_text(encoding="utf-8"))
    assert set(record["held_out"]) == set(QUALITIES)
    assert all(entry["n"] == 2 * 6 for entry in record["held_out"].values())  # two of twelve samples, three candidates
    calibration = json.loads((output / CALIBRATION).read_text(encoding="utf-8"))
    assert set(calibration) == set(QUALITIES)
    before, after = (load_scorer(path).text_model.state_dict() for path in ("embedded", output))
    assert any(not before[name].equal(after[name].to(before[name].dtype)) for name in before)

    times = [(output / stage / "config.json").stat().st_mtime_ns for stage in recipe.STAGES]
    recipe.adapt_scorer(small, "embedded", written, output)  # its stages are there
    assert times == [(output / stage / "config.json").stat().st_mtime_ns for stage in recipe.STAGES]
    with pytest.raises(SrcfastError, match="another recipe"):
        recipe.adapt_scorer(replace(small, seed=1), "embedded", written, output)
