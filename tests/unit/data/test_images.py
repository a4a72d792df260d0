"""Images are read from inside of their root, whole, still and upright, or refused by name."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.seeds import fresh_rng
from PIL import Image, ImageFile, PngImagePlugin

from srcfast.data import images
from srcfast.data.images import check_image, from_base64, image_file, load_image
from srcfast.errors import InputError

DECODERS = (load_image, check_image)
LOADERS = (*DECODERS, image_file)


def noise(width: int, height: int) -> Image.Image:
    pixels = fresh_rng().integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("ending", ["png", "bmp", "ppm", "tiff", "webp", "jpg", "gif"])
def test_still_images_load_as_rgb_in_their_own_size(tmp_path: Path, ending: str) -> None:
    picture = noise(23, 17)
    (tmp_path / "below").mkdir()
    picture.save(tmp_path / "below" / f"a.{ending}")
    loaded = load_image(tmp_path, f"below/a.{ending}")
    check_image(tmp_path, f"below/a.{ending}")
    assert loaded.mode == "RGB" and loaded.size == (23, 17)
    if ending in ("png", "bmp", "ppm", "tiff"):  # those that lose nothing
        assert np.array_equal(np.asarray(loaded), np.asarray(picture))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = noise(9, 5)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter: to be shown turned back
    picture.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path, "a.png")), np.rot90(np.asarray(picture), -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tiff", "webp", "jpg"])
def test_the_size_that_a_header_says_is_the_upright_one(tmp_path: Path, ending: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(23, 17).save(tmp_path / f"a.{ending}", exif=exif)
    found, loaded = image_file(tmp_path, f"a.{ending}"), load_image(tmp_path, f"a.{ending}")
    assert (found.width, found.height) == loaded.size == ((17, 23) if orientation > 4 else (23, 17))
    assert found.load().size == loaded.size


@pytest.mark.parametrize("ending", ["png", "tiff", "webp", "jpg", "bmp", "gif", "ppm"])
def test_no_pixel_is_decoded_for_a_size(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(230, 170).save(file := tmp_path / f"a.{ending}")

    def refuse(self: Image.Image) -> None:
        raise AssertionError("decoded")

    for kind in (ImageFile.ImageFile, Image.Image):
        monkeypatch.setattr(kind, "load", refuse)
    found = image_file(tmp_path, file.name)
    assert (found.width, found.height) == (230, 170)


def test_an_image_cut_off_behind_its_header_is_refused_when_it_is_decoded(tmp_path: Path) -> None:
    noise(230, 170).save(whole := tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(whole.read_bytes()[:3000])
    found = image_file(tmp_path, "b.jpg")
    assert (found.width, found.height) == (230, 170)
    with pytest.raises(InputError, match=r"b\.jpg"):
        found.load()


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    values = fresh_rng().integers(0, 65536, (7, 11), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(load_image(tmp_path, "a.png"))[..., 0], values // 256)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "name", ["../secret.png", "below/../../secret.png", "link.png", "linked/secret.png", "ABSOLUTE"]
)
def test_paths_out_of_the_root_are_refused(tmp_path: Path, load, name: str) -> None:
    root = tmp_path / "root"
    (root / "below").mkdir(parents=True)
    secret = tmp_path / "secret.png"
    noise(4, 4).save(secret)
    os.symlink(secret, root / "link.png")
    os.symlink(tmp_path, root / "linked")
    with pytest.raises(InputError, match="below") as refused:
        load(root, str(secret) if name == "ABSOLUTE" else name)
    assert refused.value.field == "image" and refused.value.fix


def test_a_link_that_stays_inside_is_followed(tmp_path: Path) -> None:
    noise(4, 4).save(tmp_path / "a.png")
    os.symlink(tmp_path / "a.png", tmp_path / "b.png")
    assert load_image(tmp_path, "b.png").size == (4, 4)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["none.png", "", ".", "a\0b.png", "x" * 5000, "loop.png", "pipe"])
def test_what_is_no_file_is_refused(tmp_path: Path, load, name: str) -> None:
    os.symlink(tmp_path / "loop.png", tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe")  # opened by mistake, it would hang
    with pytest.raises(InputError):
        load(tmp_path, name)


@pytest.mark.parametrize("load", DECODERS)
@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "webp", "gif", "tiff"])
def test_truncated_images_are_refused(tmp_path: Path, load, ending: str) -> None:
    data = io.BytesIO()
    noise(64, 48).save(data, {"jpg": "jpeg"}.get(ending, ending))
    (tmp_path / "a").write_bytes(data.getvalue()[: len(data.getvalue()) * 2 // 3])
    with pytest.raises(InputError, match="whole image"):
        load(tmp_path, "a")


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "data", [b"", b"plain text", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_no_image_is_refused(tmp_path: Path, load, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError):
        load(tmp_path, "a.png")


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_animated_images_are_refused(tmp_path: Path, load, ending: str) -> None:
    noise(8, 8).save(tmp_path / f"a.{ending}", save_all=True, append_images=[noise(8, 8)])
    with pytest.raises(InputError, match="still image"):
        load(tmp_path, f"a.{ending}")


def test_a_phones_photo_with_a_preview_behind_it_is_a_still_image(tmp_path: Path) -> None:
    noise(32, 24).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[noise(8, 6)])
    assert load_image(tmp_path, "a.jpg").size == (32, 24)


@pytest.mark.parametrize("load", LOADERS)
def test_decompression_bombs_and_large_files_are_refused(tmp_path: Path, load, monkeypatch) -> None:
    Image.new("1", (8000, 8000)).save(tmp_path / "wide.png")  # 64 million pixels in some kilobytes
    with pytest.raises(InputError, match="at most 50,000,000 pixels, found 8000 x 8000"):
        load(tmp_path, "wide.png")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # Pillow refuses twice that before we see the size
        with pytest.raises(InputError, match="at most 50,000,000 pixels, found Image size"):
            load(tmp_path, "wide.png")
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    noise(16, 16).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="100 bytes"):
        load(tmp_path, "a.png")


@pytest.mark.parametrize("load", LOADERS)
def test_a_text_chunk_that_swells_is_refused(tmp_path: Path, load) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (8 << 20), zip=True)
    noise(8, 8).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(InputError, match="too large"):
        load(tmp_path, "a.png")


def test_base64_is_decoded_across_line_breaks_or_refused() -> None:
    assert from_base64("aGVs\nbG8=", "t") == b"hello"
    for broken in ("aGVsbG8", "a b*c=", "\u00e9"):
        with pytest.raises(InputError, match="base64"):
            from_base64(broken, "t")
