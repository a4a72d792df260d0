"""Splits of easy-VQA that the package does not have: validation, what is left to fit on, and the world's wordings."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from PIL import Image

from srcfast.data.rationale_format import format_response, parse_response
from srcfast.data.records import Sample
from srcfast.world.easy_vqa import SPLITS, read_easy_vqa, reworded
from srcfast.world.verification import verify_sample

pytest.importorskip("easy_vqa")


def contents(samples: list[Sample]) -> set[str]:
    """Hashes of the pixels of all images."""
    found = set()
    for path in {sample.image_root / sample.images[0] for sample in samples}:
        with Image.open(path) as image:
            found.add(hashlib.sha256(image.convert("RGB").tobytes()).hexdigest())
    return found


def test_fit_validation_and_test_share_no_image() -> None:
    fit, validation, test = (contents(read_easy_vqa(split)) for split in ("fit", "validation", "test"))
    assert (len(fit), len(validation), len(test)) == (3625, 375, 1000)
    assert len(fit | validation | test) == 5000


def test_fit_and_validation_are_the_training_questions() -> None:
    train, fit, validation = (read_easy_vqa(split) for split in ("train", "fit", "validation"))
    assert (len(train), len(fit), len(validation)) == (38575, 35019, 3556)

    def asked(samples: list[Sample]) -> list[tuple[str, str, str, str]]:
        return [(s.id.rsplit("-", 1)[1], s.images[0], s.question, s.answer) for s in samples]

    assert sorted([*asked(fit), *asked(validation)]) == asked(train)
    by_id = {sample.id.rsplit("-", 1)[1]: sample for sample in train}
    for sample in validation:
        same = by_id[sample.id.rsplit("-", 1)[1]]
        assert sample.facts == same.facts and sample.rationale == same.rationale and sample.images == same.images
        assert sample.extra == same.extra | {"split": "validation"}


def test_first_samples_are_these() -> None:
    def first(split: str) -> tuple[str, str, str, str]:
        [sample] = read_easy_vqa(split, limit=1, seed=0)
        return sample.id, sample.images[0], sample.question, sample.answer

    assert first("train") == (
        "easy-vqa-train-19668",
        "train/images/2046.png",
        "does the image contain a rectangle?",
        "no",
    )
    assert first("test") == ("easy-vqa-test-06099", "test/images/624.png", "is there not a brown shape?", "yes")
    assert first("fit") == ("easy-vqa-fit-37161", "train/images/3855.png", "is there not a brown shape?", "yes")
    assert first("validation") == (
        "easy-vqa-validation-18914",
        "train/images/1968.png",
        "is no brown shape present?",
        "yes",
    )
    assert first("validation-reworded") == (
        "easy-vqa-validation-reworded-18914",
        "train/images/1968.png",
        "Is there an object and no brown object?",
        "yes",
    )


@pytest.mark.parametrize("split", ["validation", "test"])
def test_reworded_samples_are_the_same_but_for_the_question(split: str) -> None:
    samples, other = read_easy_vqa(split, 400, seed=2), read_easy_vqa(f"{split}-reworded", 400, seed=2)
    wordings: Counter[str] = Counter()
    for sample, reworded_sample in zip(samples, other, strict=True):
        assert reworded_sample.id == sample.id.replace(f"-{split}-", f"-{split}-reworded-")
        same = ("images", "answer", "rationale", "facts", "image_root")
        assert all(getattr(sample, name) == getattr(reworded_sample, name) for name in same)
        assert reworded_sample.extra == sample.extra | {"split": f"{split}-reworded"}
        response = format_response(sample.extra["see"], sample.extra["think"], sample.answer, "tagged")
        result = verify_sample(reworded_sample, parse_response(response))
        assert result is not None and result.aligned
        wordings[" ".join(reworded_sample.question.split()[:4])] += 1
        assert "shape present" not in reworded_sample.question and reworded_sample.question[0].isupper()
    assert {words for words, _ in wordings.most_common(3)} <= {
        "Is there an object",
        "Is there a circle?",
        "Is there a rectangle?",
        "Is there a triangle?",
        "What color is the",
        "What shape is the",
    }


@pytest.mark.parametrize(
    ("program", "question"),
    [
        ({"op": "exists", "of": {"color": "red"}}, "Is there a red object?"),
        ({"op": "exists", "of": {"shape": "circle"}}, "Is there a circle?"),
        ({"op": "none", "of": {"shape": "circle"}}, "Is there an object and no circle?"),
        ({"op": "none", "of": {"color": "teal"}}, "Is there an object and no teal object?"),
        ({"op": "query", "attribute": "color", "of": {"shape": "triangle"}}, "What color is the triangle?"),
        ({"op": "query", "attribute": "shape", "of": {"color": "blue"}}, "What shape is the blue object?"),
        ({"op": "query", "attribute": "color", "of": {}}, "What color is the object?"),
    ],
)
def test_the_world_s_wordings_by_hand(program: dict, question: str) -> None:
    assert reworded(program) == question


def test_all_splits_are_these() -> None:
    names = ["train", "fit", "validation", "test"]
    assert list(SPLITS) == [*names, *[f"{name}-reworded" for name in names]]
