"""Controls of an evaluation's images: gray ones of the same sizes, and those of another sample."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.seeds import fresh_rng
from PIL import Image

from srcfast.data.image_controls import blank_images, shuffled_images
from srcfast.data.records import Sample
from srcfast.errors import InputError


def sample(name: str, images: tuple[str, ...], root: Path) -> Sample:
    return Sample(id=name, images=images, question="?", answer="a", rationale=None, facts=(), extra={}, image_root=root)


def test_blank_images_are_gray_and_as_large(tmp_path: Path) -> None:
    Image.new("RGB", (31, 17), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (0, 255, 0)).save(tmp_path / "b.png")
    samples = [
        sample("one", ("a.png", "b.png"), tmp_path),
        sample("two", ("a.png",), tmp_path),
        sample("three", (), tmp_path),
    ]
    first, second, third = blank_images(samples, tmp_path / "made")
    assert (first.images, second.images, third.images) == (
        ("blank-31x17.png", "blank-8x8.png"),
        ("blank-31x17.png",),
        (),
    )
    with Image.open(first.image_root / first.images[0]) as image:
        assert image.size == (31, 17)
        assert image.convert("RGB").getcolors() == [(31 * 17, (127, 127, 127))]
    assert (first.id, first.question, samples[0].images) == ("one", "?", ("a.png", "b.png"))


def test_each_sample_is_shown_another_one_s_images_and_each_image_as_often_as_before() -> None:
    rng = fresh_rng()
    names = [f"{int(n)}.png" for n in rng.integers(0, 9, size=40)]
    samples = [sample(str(k), (name,), Path("r")) for k, name in enumerate(names)]
    samples += [sample(f"pair {k}", (f"p{k}.png", f"q{k}.png"), Path("r")) for k in range(3)]
    shuffled = shuffled_images(samples, 3)
    assert [s.id for s in shuffled] == [s.id for s in samples]
    assert all(
        not {*new.images} & {*old.images} and len(new.images) == len(old.images)
        for new, old in zip(shuffled, samples, strict=True)
    )
    assert sorted(s.images for s in shuffled) == sorted(s.images for s in samples)
    assert shuffled == shuffled_images(samples, 3)
    assert shuffled != shuffled_images(samples, 4)


def test_samples_that_all_show_the_same_image_cannot_be_shuffled() -> None:
    samples = [sample(str(k), ("a.png",), Path("r")) for k in range(3)] + [sample("b", ("b.png",), Path("r"))]
    with pytest.raises(InputError, match="3 of 4 samples with the same images"):
        shuffled_images(samples, 0)
