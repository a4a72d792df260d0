"""What holds for samples of every family of numbers: records, balance, aligned rationales, and none after a change."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from srcfast.data.rationale_format import ParsedResponse, format_response, parse_response, tagged_rationale
from srcfast.data.records import Sample
from srcfast.world.charts import CHARTS
from srcfast.world.digits import DIGITS
from srcfast.world.number_oracle import is_true, parse_claim
from srcfast.world.number_samples import Family, number_samples
from srcfast.world.numbers import Numbers, answer_text
from srcfast.world.scenes import SPLITS
from srcfast.world.verification import verify_sample

FAMILIES = [
    pytest.param(
        family, id=family.name, marks=pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}")
    )
    for family, package in ((DIGITS, "sklearn"), (CHARTS, "statsmodels"))
]
pytestmark = pytest.mark.parametrize("family", FAMILIES)


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srcfast.world.number_samples.draw_missing", lambda *_: None)


def is_aligned(sample: Sample, see: list[str], think: list[str], answer: str) -> bool:
    judgement = verify_sample(sample, ParsedResponse(tuple(see), tuple(think), answer))
    assert judgement is not None
    return judgement.aligned


def test_samples_are_complete_records(family: Family, tmp_path: Path) -> None:
    samples = number_samples(family, "test", 61, 5, image_dir=tmp_path)
    assert [sample.id for sample in samples] == [f"{family.name}-test-5-{number:06d}" for number in range(61)]
    for sample in samples:
        assert sample.rationale == tagged_rationale(sample.extra["see"], sample.extra["think"])
        assert sample.image_root == tmp_path and sample.extra["dataset"] == family.name
        row = json.loads(json.dumps(sample.to_json()))
        again = Sample.from_json(row, file="f", line=1, image_root=tmp_path)
        assert again == sample
        with Image.open(tmp_path / sample.images[0]) as image:
            assert image.size == ((72, 72) if family is DIGITS else (144, 144)) and image.mode == "RGB"
    images = {sample.images[0] for sample in samples}
    assert len(images) == 21 and {path.name for path in tmp_path.iterdir()} == images
    kinds = Counter(sample.extra["kind"] for sample in samples)
    assert max(kinds.values()) - min(kinds.values()) <= 2
    for n in (0, 1, 8):  # fewer are the first ones
        assert number_samples(family, "test", n, 5, image_dir=tmp_path) == samples[:n]


def test_another_process_draws_the_same_samples_and_pictures(family: Family, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    samples = number_samples(family, "train", 12, 2, image_dir=here, with_rationale=False)
    assert all(sample.rationale is None for sample in samples)
    source = (
        "import sys; from pathlib import Path; from srcfast.world.number_samples import number_samples\n"
        f"from srcfast.world.{family.name} import {family.name.upper()} as family\n"
        "for s in number_samples(family, 'train', 12, 2, image_dir=Path(sys.argv[1])):\n"
        "    print(s.id, s.question, s.answer, s.images)"
    )
    command = [sys.executable, "-c", source, str(there)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout.splitlines()
    assert lines == [f"{s.id} {s.question} {s.answer} {s.images}" for s in samples]
    written = {path.name: path.read_bytes() for path in here.iterdir()}
    assert len(written) == 4 and written == {path.name: path.read_bytes() for path in there.iterdir()}


@pytest.mark.parametrize("split", SPLITS)
def test_every_true_rationale_is_aligned(
    family: Family, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    for sample in number_samples(family, split, 300, random.randrange(10**6), image_dir=tmp_path):
        see, think = sample.extra["see"], sample.extra["think"]
        assert is_aligned(sample, see, think, sample.answer), sample
        assert is_aligned(sample, random.sample(see, len(see)), think, sample.answer), sample
        assert is_aligned(sample, [], [*see, *think], sample.answer), sample  # as `plain` is parsed
        assert is_aligned(sample, list(sample.facts), [], sample.answer), sample
        assert parse_response(format_response(see, think, sample.answer, "tagged")).perception == tuple(see)
        assert all(is_true(sentence, Numbers.from_json(sample.extra["numbers"])) for sentence in (*sample.facts, *see))


def other_numbers(sentence: str) -> list[str]:
    """The sentence with one of its numbers changed, to each of five others."""
    changed = []
    for match in re.finditer(r"\d+(\.\d)?", sentence):
        value = Fraction(match[0])
        others = {value + 1, abs(value - 1), value * 2 + 7, value + Fraction(1, 10), abs(value - Fraction(1, 10))}
        for other in others - {value}:
            text = f"{float(other):g}"
            changed.append(sentence[: match.start()] + text + sentence[match.end() :])
    return changed


def is_misread(sample: Sample, sentence: str) -> bool:
    """A chart's value is read otherwise, within the tolerance, and the question asks for no number."""
    truth, program = Numbers.from_json(sample.extra["numbers"]), sample.extra["program"]
    return truth.axis is not None and program["op"] in ("where", "count") and is_true(sentence, truth) is True


def test_a_rationale_with_one_number_changed_is_not_aligned(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    changes = misread = 0
    for split in ("train", "test", "generalisation"):
        for sample in number_samples(family, split, 150, random.randrange(10**6), image_dir=tmp_path):
            see, think = sample.extra["see"], sample.extra["think"]
            for index, sentence in enumerate([*see, *think]):
                for changed in other_numbers(sentence):
                    sentences = [*see, *think]
                    sentences[index] = changed
                    changes += 1
                    if is_aligned(sample, sentences[: len(see)], sentences[len(see) :], sample.answer):
                        assert index < len(see) and is_misread(sample, changed), (sample, changed)
                        misread += 1
            for changed in other_numbers(sample.answer):
                assert not is_aligned(sample, see, think, changed), (sample, changed)
    assert changes > 3000 and (misread > 0) == (family is CHARTS)


def test_without_one_of_the_needed_claims_no_rationale_is_aligned(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    for sample in number_samples(family, "test", 150, random.randrange(10**6), image_dir=tmp_path):
        see, think = sample.extra["see"], sample.extra["think"]
        for index in range(len(see)):
            assert not is_aligned(sample, see[:index] + see[index + 1 :], think, sample.answer), sample
        assert is_aligned(sample, see, [], sample.answer), sample


def test_answers_are_balanced_within_a_kind(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    samples = number_samples(family, "train", 2000, 0, image_dir=tmp_path)
    by_kind: dict[str, Counter[str]] = {}
    for sample in samples:
        by_kind.setdefault(sample.extra["kind"], Counter())[sample.answer] += 1
    for kind, answers in by_kind.items():
        (_, most), total = answers.most_common(1)[0], answers.total()
        assert most / total < (0.6 if kind == "larger" else 0.3 if kind in ("count", "extreme") else 0.25), (
            kind,
            answers,
        )


def test_a_question_is_answered_by_its_program_and_asked_once_about_a_picture(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    samples = number_samples(family, "validation", 400, 0, image_dir=tmp_path)
    assert len({(sample.images, sample.question) for sample in samples}) == 400
    for sample in samples:
        assert answer_text(sample.extra["program"], Numbers.from_json(sample.extra["numbers"])) == sample.answer
        assert all(parse_claim(sentence) is not None for sentence in sample.facts)
        assert sample.extra.get("tolerance") == (
            0.05
            if family is CHARTS and sample.extra["program"]["op"] in ("value", "sum", "difference", "average")
            else None
        )
