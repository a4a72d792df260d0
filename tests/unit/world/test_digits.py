"""Mosaics of digits: which digits a split has, literal first samples, pictures, what happens without scikit-learn."""

from __future__ import annotations

import hashlib
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srcfast.errors import InputError, SrcfastError
from srcfast.world.digits import DIGITS, indices_of, read_digits
from srcfast.world.number_samples import number_samples
from srcfast.world.scenes import PLACES

pytestmark = pytest.mark.skipif(find_spec("sklearn") is None, reason="the digits come with scikit-learn")


def test_the_digits_are_scikit_learns() -> None:
    pixels, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    assert [digit for digit, _ in read_digits()] == labels.tolist()
    for index in (0, 1, 900, 1796):
        assert list(read_digits()[index][1]) == [int(value * 255 / 16) for value in pixels[index]]


def test_each_digit_is_in_one_split_and_generalisation_shows_those_of_test() -> None:
    shares = {"base": 48, "train": 24, "scorer": 10, "validation": 8, "test": 10}
    indices = [index for split in shares for index in indices_of(split)]
    assert sorted(indices) == list(range(1797))
    for split, share in shares.items():
        assert abs(len(indices_of(split)) / 1797 - share / 100) < 0.03  # of a share of 48 %, 1,797 scatter by 1.2 %
        assert len({read_digits()[index][0] for index in indices_of(split)}) == 10
    bucket = int(hashlib.sha256(b"digit 13").hexdigest()[:12], 16) % 100
    assert bucket >= 90 and 13 in indices_of("test")
    assert indices_of("generalisation") == indices_of("test")


def test_the_first_samples_are_literal_ones(tmp_path: Path) -> None:
    samples = number_samples(DIGITS, "test", 4, 3, image_dir=tmp_path)
    assert [(s.id, s.question, s.answer) for s in samples] == [
        ("digits-test-3-000000", "What is the largest digit?", "7"),
        ("digits-test-3-000001", "How many digits smaller than 5 are there?", "4"),
        ("digits-test-3-000002", "Which digit can you see at the bottom?", "4"),
        ("digits-test-3-000003", "Is the digit at the top smaller than the digit at the left?", "no"),
    ]
    assert samples[3].rationale == (
        "<see> The digit at the left is 0. The digit at the top is 2. </see> <think> 0 is not larger than 2. </think>"
    )
    assert samples[0].extra["digits"] == [13, 974, 1361, 1405, 24, 557]
    assert samples[0].images == samples[2].images == ("digits-test-ee60cf23ef0a531d.png",)
    assert samples[2].facts == (
        "The digit at the top is 3.",
        "The digit at the left is 0.",
        "The digit at the center is 5.",
        "The digit at the bottom left is 7.",
        "The digit at the bottom is 4.",
        "The digit at the bottom right is 4.",
    )
    composed = number_samples(DIGITS, "generalisation", 3, 3, image_dir=tmp_path)
    assert [(s.question, s.answer, s.extra["kind"]) for s in composed] == [
        ("What is the difference between the largest and the smallest digit?", "9", "range"),
        ("What do the digits at the top left, at the top right and at the left add up to?", "17", "sum_of_three"),
        ("What do the even digits add up to?", "8", "sum_of_some"),
    ]


@pytest.mark.parametrize(
    ("program", "wordings"),
    [
        ({"op": "value", "of": ["left"]}, ("What digit is at the left?", "Which digit can you see at the left?")),
        ({"op": "sum"}, ("What is the sum of all digits?", "What do all digits add up to?")),
        (
            {"op": "sum", "of": ["top", "left"]},
            (
                "What is the sum of the digits at the top and at the left?",
                "What do the digits at the top and at the left add up to?",
            ),
        ),
        (
            {"op": "difference", "of": ["top", "left"]},
            ("What is the difference between the digits at the top and at the left?",) * 2,
        ),
        (
            {"op": "where", "which": "smallest"},
            ("Where is the smallest digit?", "At which place is the smallest digit?"),
        ),
        (
            {"op": "larger", "of": ["top", "left"]},
            (
                "Is the digit at the top larger than the digit at the left?",
                "Is the digit at the left smaller than the digit at the top?",
            ),
        ),
        ({"op": "count"}, ("How many digits are there?",) * 2),
        ({"op": "count", "test": "odd"}, ("How many odd digits are there?",) * 2),
        ({"op": "count", "test": "equal", "than": 4}, ("How many digits equal to 4 are there?",) * 2),
        (
            {"op": "sum", "test": "larger", "than": 4},
            ("What is the sum of the digits larger than 4?", "What do the digits larger than 4 add up to?"),
        ),
    ],
)
def test_questions_are_worded_in_english(program: dict[str, Any], wordings: tuple[str, str]) -> None:
    picture = next(DIGITS.pictures("train", 0))
    assert tuple(DIGITS.question(picture, program, wording) for wording in (0, 1)) == wordings


def test_what_no_other_split_asks_is_asked_in_generalisation_alone(tmp_path: Path) -> None:
    trained = {
        (p["op"], p.get("test"), len(p.get("of", [])))
        for split in ("base", "train", "scorer", "validation", "test")
        for p in (s.extra["program"] for s in number_samples(DIGITS, split, 300, 0, image_dir=tmp_path))
    }
    composed = number_samples(DIGITS, "generalisation", 300, 0, image_dir=tmp_path)
    asked = {(p["op"], p.get("test"), len(p.get("of", []))) for p in (s.extra["program"] for s in composed)}
    assert asked == {("range", None, 0), ("sum", None, 3)} | {
        ("sum", t, 0) for t in ("even", "odd", "larger", "smaller")
    }
    assert not asked & trained


def test_a_digit_is_drawn_in_its_cell_and_no_other_cell_has_ink(tmp_path: Path) -> None:
    samples = number_samples(DIGITS, "train", 90, 5, image_dir=tmp_path)
    assert {len(sample.facts) for sample in samples} == {2, 3, 4, 5, 6}
    for sample in samples:
        with Image.open(tmp_path / sample.images[0]) as image:
            assert image.size == (72, 72) and image.mode == "RGB"
            pixels = np.asarray(image).astype(int)
        for place, name in enumerate(PLACES):
            row, column = divmod(place, 3)
            cell = pixels[24 * row : 24 * row + 24, 24 * column : 24 * column + 24]
            contrast = int((cell.max((0, 1)) - cell.min((0, 1))).max())
            assert contrast > 90 if name in sample.extra["numbers"]["values"] else contrast == 0


def test_pictures_of_one_mosaic_look_like_its_digits(tmp_path: Path) -> None:
    """Back at 8x8 pixels, a drawn digit is nearer to its own image than to nine in ten of the other digits' images."""
    images = np.array([list(pixels) for _, pixels in read_digits()], dtype=float)
    ranks = []
    for sample in number_samples(DIGITS, "test", 60, 1, image_dir=tmp_path):
        with Image.open(tmp_path / sample.images[0]) as image:
            gray = 255 - np.asarray(image.convert("L")).astype(float)
        for name, index in zip(sample.extra["numbers"]["values"], sample.extra["digits"], strict=True):
            row, column = divmod(PLACES.index(name), 3)
            cell = Image.fromarray(gray[24 * row : 24 * row + 24, 24 * column : 24 * column + 24]).resize((8, 8))
            drawn = np.asarray(cell).ravel()
            similarity = [np.corrcoef(drawn, image)[0, 1] for image in images[:: max(1, len(images) // 200)]]
            ranks.append(np.mean(np.corrcoef(drawn, images[index])[0, 1] > np.array(similarity)))
    assert np.mean(ranks) > 0.9


def test_digits_of_a_split_are_drawn_evenly(tmp_path: Path) -> None:
    counts = Counter(
        index for s in number_samples(DIGITS, "test", 600, 0, image_dir=tmp_path) for index in s.extra["digits"]
    )
    assert set(counts) <= set(indices_of("test")) and len(counts) > 0.9 * len(indices_of("test"))


@pytest.mark.parametrize("split", ["tset", "", "easy_vqa"])
def test_an_unknown_split_is_an_error(split: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="split.*one of base, train, scorer, validation, test, generalisation"):
        number_samples(DIGITS, split, 3, 0, image_dir=tmp_path)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        SrcfastError, match="the data set digits needs the package scikit-learn. Fix: pip install scikit-learn"
    ):
        read_digits.__wrapped__()
