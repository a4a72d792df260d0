"""Every malformed input ends in an error that says what is wrong, or is set aside with its reason; none is used."""

from __future__ import annotations

import io
from pathlib import Path

import malformed_checkpoints
import pytest
from malformed_case import Case, ending
from malformed_corpus import CORPUS
from malformed_images import SOUND
from PIL import Image

from srcfast.data.images import check_image, load_image

NAMES = [f"{case.kind}: {case.wrong}" for case in CORPUS]


@pytest.mark.parametrize("case", CORPUS, ids=NAMES)
def test_it_ends_by_name(case: Case, tmp_path: Path) -> None:
    text = ending(case, tmp_path)
    assert text, "nothing was found wrong"
    assert [word for word in case.words if word not in text] == [], text
    assert len(text) < 2000 and "Traceback" not in text


def test_each_is_there_once() -> None:
    assert len(set(NAMES)) == len(CORPUS) >= 200


@pytest.mark.parametrize("name", SOUND)
def test_odd_images_that_are_sound_are_read_as_they_look(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(SOUND[name])  # whatever the format: the ending does not tell it
    check_image(tmp_path, "a.png")
    image = load_image(tmp_path, "a.png")
    assert image.mode == "RGB" and image.size == Image.open(io.BytesIO(SOUND[name])).size


def test_16_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(SOUND["a PNG of 16 bits"])
    image = load_image(tmp_path, "a.png")
    assert (image.getpixel((0, 0)), image.getpixel((0, 1))) == ((0, 0, 0), (255, 255, 255))


def test_what_the_malformed_checkpoints_are_made_from_is_sound(tmp_path: Path) -> None:
    malformed_checkpoints.read_adapter(malformed_checkpoints.adapter()(tmp_path))
    malformed_checkpoints.read_lvlm(malformed_checkpoints.lvlm({})(tmp_path))
