"""Every malformed input ends in an error that says what is wrong, or is set aside with its reason; none is used."""

from __future__ import annotations

import io
from pathlib import Path

import malformed_checkpoints
import malformed_runs
import pytest
import torch
from malformed_case import Case, ending
from malformed_corpus import CORPUS
from malformed_images import SOUND
from PIL import Image
from safetensors.torch import save_file

from srcfast.data.images import check_image, load_image
from srcfast.errors import InputError
from srcfast.models.checkpoint import read_file
from srcfast.report.page import write_report

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


def test_large_weights_are_sound_though_their_sum_overflows(tmp_path: Path) -> None:
    save_file({"a": torch.full((2048,), 60_000.0, dtype=torch.float16)}, tmp_path / "a.safetensors")
    ((_, tensor),) = read_file(tmp_path / "a.safetensors")
    assert tensor.isfinite().all() and not tensor.sum().isfinite()


def test_four_bits_before_they_are_spoilt_are_sound(tmp_path: Path) -> None:
    file = malformed_checkpoints.four_bits({}, {})
    malformed_checkpoints.read_model(malformed_checkpoints.model({malformed_checkpoints.WEIGHTS: file})(tmp_path))


def test_what_the_malformed_runs_are_made_from_is_sound(tmp_path: Path) -> None:
    def sound(place: Path) -> None:
        assert place.exists()

    malformed_runs.ask_manifest(malformed_runs.run_with(sound)(tmp_path))
    assert malformed_runs.load_checkpoint(malformed_runs.training_with(sound)(tmp_path)) == []
    assert malformed_runs.do_parts(malformed_runs.part_with(lambda whole: whole)(tmp_path)) == []
    assert write_report(malformed_runs.page_of({})(tmp_path)).is_file()
    with pytest.raises(InputError, match="adapter: expected an adapter"):  # the batch itself is read
        malformed_runs.replay_batch(malformed_runs.batch({})(tmp_path))
