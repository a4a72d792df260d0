"""Images are read from inside of their root, whole, still and upright, or refused by name."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.seeds import fresh_rng
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin, TiffTags
from transformers.image_utils import load_image as transformers_image

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
    Image.init()  # Pillow's plugins load images of their own when they are first imported

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


def wide(top: int, dtype: type = np.uint16, seed: int = 20) -> np.ndarray:
    """Values from 0 to `top`, both among them, in random order."""
    values = np.random.default_rng(seed).integers(0, top + 1, (7, 11))
    values[2, 3], values[4, 5] = 0, top
    return values.astype(dtype)


def save_png(file: Path, values: np.ndarray, significant: int | None = None) -> None:
    """Write a PNG of 16 bits, of one channel or three; with a chunk sBIT where so many bits count."""
    height, width, *channels = values.shape
    kind, count = (2, 3) if channels else (0, 1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)), (b"tEXt", b"a\0sBIT \x08")]
    chunks += [] if significant is None else [(b"sBIT", bytes([significant] * count))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, chunks)))


def png_chunk(chunk: tuple[bytes, bytes]) -> bytes:
    name, data = chunk
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("significant", [None, 10, 16])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, channels: int, significant: int | None) -> None:
    values = wide(65535)
    values = np.stack([values] * 3, axis=-1) if channels == 3 else values
    save_png(tmp_path / "a.png", values, significant)
    check_image(tmp_path, "a.png")
    loaded = np.asarray(load_image(tmp_path, "a.png"))
    assert np.array_equal(loaded, values // 256 if channels == 3 else np.stack([values // 256] * 3, axis=-1))


@pytest.mark.parametrize("load", DECODERS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_values_of_fewer_bits_in_sixteen_are_refused(tmp_path: Path, load, bits: int, channels: int) -> None:
    values = wide(2**bits - 1)
    save_png(tmp_path / "a.png", np.stack([values] * 3, axis=-1) if channels == 3 else values)
    with pytest.raises(InputError, match=r"a\.png.*sBIT.*SMaxSampleValue.*Fix: save it in 8 bits"):
        load(tmp_path, "a.png")
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=r"a\.tiff.*Fix: save it in 8 bits"):
        load(tmp_path, "a.tiff")


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_a_png_says_how_many_bits_count(tmp_path: Path, bits: int) -> None:
    values = wide(2**bits - 1)
    save_png(tmp_path / "low.png", values, bits)  # not shifted up, as some writers leave them
    save_png(tmp_path / "high.png", values << (16 - bits), bits)  # shifted up, as PNG's specification has it
    dark = values % (4096 >> (16 - bits))
    save_png(tmp_path / "dark.png", dark << (16 - bits), bits)
    for name, expected in (("low", values), ("high", values), ("dark", dark)):
        check_image(tmp_path, f"{name}.png")
        assert np.array_equal(np.asarray(load_image(tmp_path, f"{name}.png"))[..., 0], expected >> (bits - 8)), name


def test_a_png_of_three_channels_whose_lower_bits_count_is_refused(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", np.stack([wide(4095)] * 3, axis=-1), 12)
    with pytest.raises(InputError, match="sBIT"):
        load_image(tmp_path, "a.png")


def test_black_in_sixteen_bits_is_black(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", np.zeros((3, 5), np.uint16))
    assert not np.asarray(load_image(tmp_path, "a.png")).any()


WIDE_TIFFS = {  # what has a sign, a point, or more than 16 bits
    "int32 of 8 bits": wide(255, np.int32),
    "int32 of 16 bits": wide(65535, np.int32),
    "int32 of its whole range": wide(2**31 - 1, np.int32),
    "float from 0 to 1": wide(255, np.float32) / 255,
    "float from 0 to 10": wide(255, np.float32) / 25.5,
    "float from -1 to 1": wide(255, np.float32) / 127.5 - 1,
    "float from -128 to 127": wide(255, np.float32) - 128,
    "float of 16 bits": wide(65535, np.float32),
    "float with one that is none": np.where(wide(255) == 0, np.float32("nan"), wide(255, np.float32)),
}


@pytest.mark.parametrize("load", DECODERS)
@pytest.mark.parametrize("what", WIDE_TIFFS)
def test_a_tiff_of_an_unknown_range_is_refused(tmp_path: Path, load, what: str) -> None:
    Image.fromarray(WIDE_TIFFS[what]).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=r"a\.tiff.*SMaxSampleValue.*Fix: save it in 8 bits, its values scaled"):
        load(tmp_path, "a.tiff")


def test_a_tiff_of_floats_is_read_as_8_bits_where_it_fits_them(tmp_path: Path) -> None:
    Image.fromarray(wide(255, np.float32)).save(tmp_path / "a.tiff")
    check_image(tmp_path, "a.tiff")
    assert np.array_equal(np.asarray(load_image(tmp_path, "a.tiff"))[..., 0], wide(255))


@pytest.mark.parametrize("what", [what for what in WIDE_TIFFS if "-" not in what and "none" not in what])
def test_a_tiff_whose_range_is_stated_is_scaled_by_it(tmp_path: Path, what: str) -> None:
    values = WIDE_TIFFS[what]
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[340] = tags.tagtype[341] = TiffTags.DOUBLE
    tags[340], tags[341] = (0.0,), (float(values.max()),)
    Image.fromarray(values).save(tmp_path / "a.tiff", tiffinfo=tags)
    check_image(tmp_path, "a.tiff")
    loaded = np.asarray(load_image(tmp_path, "a.tiff"))[..., 0].astype(int)
    exact = 255 * values.astype(np.float64) / float(values.max())
    assert np.abs(loaded - exact).max() <= 1  # the upper 8 bits are taken, not rounded
    assert loaded.min() == 0 and loaded.max() == 255
    for number, wrong in enumerate(((0.0, float(values.max()) / 2), (0.0, 0.0), (0.0, float("inf")), (1.0, 0.0))):
        tags[340], tags[341] = (wrong[0],), (wrong[1],)
        Image.fromarray(values).save(tmp_path / f"{number}.tiff", tiffinfo=tags)
        with pytest.raises(InputError):
            load_image(tmp_path, f"{number}.tiff")


def test_a_tiff_of_twelve_bits_or_without_a_sign_is_scaled_by_its_bits(tmp_path: Path) -> None:
    values = wide(4095)
    pairs = values[:, :10].reshape(7, 5, 2).astype(int)  # two values take three bytes
    packed = np.stack([pairs[..., 0] >> 4, (pairs[..., 0] & 15) << 4 | pairs[..., 1] >> 8, pairs[..., 1] & 255], -1)
    tags = [(256, 10), (257, 7), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 7), (279, 105)]
    data = packed.astype(np.uint8).tobytes()
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(data) + len(data) % 2)
    (tmp_path / "a.tiff").write_bytes(header + data + b"\0" * (len(data) % 2) + directory + b"\0\0\0\0")
    assert np.array_equal(np.asarray(load_image(tmp_path, "a.tiff"))[..., 0], values[:, :10] >> 4)
    Image.fromarray(wide(65535)).save(tmp_path / "b.tiff", tiffinfo={262: 0})  # white is 0
    loaded = np.asarray(load_image(tmp_path, "b.tiff"))[..., 0]
    assert np.array_equal(loaded, 255 - (wide(65535) >> 8))


@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_a_ppm_is_scaled_by_its_maximum(tmp_path: Path, top: int) -> None:
    values = wide(top)
    (tmp_path / "a.pgm").write_bytes(b"P5 11 7 %d\n" % top + values.astype(">u2" if top > 255 else "u1").tobytes())
    check_image(tmp_path, "a.pgm")
    loaded = np.asarray(load_image(tmp_path, "a.pgm"))[..., 0].astype(int)
    assert np.abs(loaded - values / top * 255).max() <= 1
    (tmp_path / "b.pfm").write_bytes(b"Pf\n11 7\n-1.0\n" + (values / top).astype("<f4").tobytes())
    with pytest.raises(InputError):
        load_image(tmp_path, "b.pfm")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_other_modes_become_what_transformers_makes_of_them(tmp_path: Path, mode: str) -> None:
    name = "a.jpg" if mode in ("CMYK", "YCbCr") else "a.png"
    picture = noise(23, 17)
    (picture.quantize(16) if mode == "P" else picture.convert(mode)).save(tmp_path / name)
    check_image(tmp_path, name)
    assert np.array_equal(np.asarray(load_image(tmp_path, name)), np.asarray(transformers_image(str(tmp_path / name))))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, kind) for mode in ("LA", "RGBA") for kind in ("png", "webp", "tiff")]
    + [("P", "png"), ("P", "gif"), ("L", "png"), ("RGB", "png")],
)
def test_transparent_parts_are_white(tmp_path: Path, mode: str, kind: str) -> None:
    """As transformers 5 composites them: a drawing in black on nothing must not come out black."""
    if mode in ("LA", "RGBA"):
        picture = Image.new(mode, (4, 1), (0,) * len(mode))
        for x, alpha in enumerate((0, 255, 51, 0)):
            picture.putpixel((x, 0), (*(0,) * (len(mode) - 1), alpha))
        picture.save(tmp_path / f"a.{kind}", **({"lossless": True, "exact": True} if kind == "webp" else {}))
        expected = [255, 0, 204, 255]  # 51 is a fifth of 255
    else:
        picture = Image.new(mode, (4, 1))  # black
        if mode == "P":
            picture.putpalette([10, 10, 10, 70, 70, 70] + [0] * 762)
        for x, value in enumerate((0, 1, 1, 0)):
            picture.putpixel((x, 0), (value,) * 3 if mode == "RGB" else value)
        picture.save(tmp_path / f"a.{kind}", transparency=(0, 0, 0) if mode == "RGB" else 0)
        other = 70 if mode == "P" else 1
        expected = [255, other, other, 255]
    check_image(tmp_path, f"a.{kind}")
    assert np.asarray(load_image(tmp_path, f"a.{kind}")).tolist() == [[[value] * 3 for value in expected]]


def test_a_cmyk_jpeg_of_adobe_s_is_no_negative(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 0, 0, 0)).save(
        tmp_path / "a.jpg"
    )  # white; Pillow writes it inverted, as Adobe does
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    assert np.asarray(load_image(tmp_path, "a.jpg")).min() > 250  # JPEG's rounding


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


def test_as_much_base64_is_taken_as_the_largest_file_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four letters encode three bytes; the bound of half as much again leaves room for line breaks."""
    monkeypatch.setattr(images, "MAX_BYTES", 99)
    assert from_base64("A" * 132, "t") == bytes(99)
    assert from_base64("A" * 132 + "\n" * 16, "t") == bytes(99)
    with pytest.raises(InputError, match="at most 99 bytes, found 149 of base64"):
        from_base64("A" * 132 + "\n" * 17, "t")
