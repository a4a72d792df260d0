"""Malformed images of every format that is accepted, and odd ones that are sound."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from malformed_case import Case, file_of, folder_of, missing
from PIL import Image

from srcfast.data.images import FORMATS, MAX_BYTES, check_image, load_image

KIND = "Images"
ENDINGS = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}


def picture(mode: str = "RGB") -> Image.Image:
    """16 x 12 pixels of noise that is the same each time: noise is not compressed away."""
    data = bytes((7 * i * i + 13 * i) % 251 for i in range(16 * 12 * 3))
    return Image.frombytes("RGB", (16, 12), data).convert(mode)


def picture_bytes(format: str, mode: str = "RGB", **options: object) -> bytes:
    """The picture in a format."""
    buffer = io.BytesIO()
    picture(mode).save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, rows: bytes = b"", depth: int = 8, color: int = 2, more: bytes = b"") -> bytes:
    """A PNG whose header says what it likes."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + more + pixels + png_chunk(b"IEND", b"")


def giants() -> dict[str, bytes]:
    """Files of a few bytes that declare a billion pixels and more."""
    bmp, gif = bytearray(picture_bytes("BMP")), bytearray(picture_bytes("GIF"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    jpeg = bytearray(picture_bytes("JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    jp2 = bytearray(picture_bytes("JPEG2000"))
    at = jp2.index(b"ihdr") + 4
    jp2[at : at + 8] = struct.pack(">II", 2**30, 2**30)
    tiff = bytearray(picture_bytes("TIFF"))
    for tag in (256, 257):  # width and length: entries of 12 bytes in the directory
        at = tiff.index(struct.pack("<HH", tag, 4)) if struct.pack("<HH", tag, 4) in tiff else -1
        at = at if at >= 0 else tiff.index(struct.pack("<HH", tag, 3))
        tiff[at : at + 12] = struct.pack("<HHII", tag, 4, 1, 60_000)
    return {
        "PNG": png(2**31 - 1, 2**31 - 1),
        "PPM": b"P6 60000 60000 255\n" + b"\0" * 100,
        "BMP": bytes(bmp),
        "GIF": bytes(gif),
        "JPEG": bytes(jpeg),
        "JPEG2000": bytes(jp2),
        "TIFF": bytes(tiff),
    }


def animated(format: str) -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, format, save_all=True, append_images=[picture().rotate(180)])
    return buffer.getvalue()


def _linked(folder: Path) -> Path:
    os.symlink(folder / "a.png", folder / "b.png")
    os.symlink(folder / "b.png", folder / "a.png")
    return folder / "a.png"


def _large(folder: Path) -> Path:
    path = folder / "a.png"
    with open(path, "wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole: it takes no space
    return path


def both(path: Path) -> None:
    """Neither the check nor the loader lets it through."""
    try:
        check_image(path.parent, path.name)
    finally:
        load_image(path.parent, path.name)


def _floats() -> bytes:
    buffer = io.BytesIO()
    picture("F").point(lambda value: value / 255).save(buffer, "TIFF")
    return buffer.getvalue()


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no file": (missing("a.png"), "no such file"),
    "a folder": (folder_of("a.png"), "a folder"),
    "links in a circle": (_linked, "image"),
    "more bytes than any image has": (_large, "at most"),
    "no byte": (file_of(b"", "a.png"), "a whole image"),
    "text": (file_of("no image", "a.png"), "a whole image"),
    "zeros": (file_of(bytes(4096), "a.png"), "a whole image"),
    "SVG": (file_of('<svg xmlns="http://www.w3.org/2000/svg"/>', "a.png"), "a whole image"),
    "PDF": (file_of("%PDF-1.4\n", "a.png"), "a whole image"),
    "EPS, a program": (file_of("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.png"), "a whole image"),
    "an icon": (file_of(picture_bytes("ICO"), "a.png"), "a whole image"),
    "a PNG of no width": (file_of(png(0, 5), "a.png"), "a whole image"),
    "a PNG without pixels": (file_of(png(4, 4), "a.png"), "a whole image"),
    "a PNG of an unknown color type": (file_of(png(4, 4, bytes(52), color=7), "a.png"), "a whole image"),
    "a PNG with a wrong checksum": (
        file_of(picture_bytes("PNG").replace(b"IDAT", b"IDAU"), "a.png"),
        "a whole image",
    ),
    "a PNG whose text swells to 100 MB": (
        file_of(png(4, 4, bytes(52), more=png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20), 1))), "a.png"),
        "a whole image",
    ),
    "a PPM of letters": (file_of("P6 a b 255\n", "a.ppm"), "a whole image"),
    "a PPM of less than no width": (file_of("P6 -4 4 255\n", "a.ppm"), "a whole image"),
    "a BMP of an unknown compression": (
        file_of(picture_bytes("BMP")[:30] + struct.pack("<I", 77) + picture_bytes("BMP")[34:], "a.bmp"),
        "a whole image",
    ),
    "a PNG of 16 bits whose values have 8": (
        file_of(png(2, 2, b"\0\0\x80\0\xff\0\0\1\0\2", depth=16, color=0), "a.png"),
        "values of 8 bits",
    ),
    "a PNG of 16 bits and color whose values have 12": (
        file_of(png(1, 1, b"\0\x0f\xff\x08\0\0\0", depth=16, color=2), "a.png"),
        "values of 8 bits",
    ),
    "a TIFF of whole numbers in 32 bits": (file_of(picture_bytes("TIFF", "I"), "a.tif"), "values of 8 bits"),
    "a TIFF of floats from 0 to 1": (file_of(_floats(), "a.tif"), "values of 8 bits"),
    "a TIFF whose directory lies outside": (file_of(b"II*\0" + struct.pack("<I", 2**31), "a.tif"), "a whole image"),
}

# Odd, and sound: read as what they show.
SOUND: dict[str, bytes] = {
    "a CMYK JPEG": picture_bytes("JPEG", "CMYK"),
    "a gray JPEG": picture_bytes("JPEG", "L"),
    "a CMYK TIFF": picture_bytes("TIFF", "CMYK"),
    "a palette PNG": picture_bytes("PNG", "P"),
    "a palette PNG with transparency": picture_bytes("PNG", "P", transparency=0),
    "a PNG of 1 bit": picture_bytes("PNG", "1"),
    "a PNG of gray and alpha": picture_bytes("PNG", "LA"),
    "a PNG of color and alpha": picture_bytes("PNG", "RGBA"),
    "a PNG of 16 bits": png(4, 2, b"\0" + bytes(8) + b"\0" + b"\xff" * 8, depth=16, color=0),
    "a PNG of 16 bits and color": png(1, 1, b"\0" + b"\xff\xff\x80\0\0\0", depth=16, color=2),
    "a TIFF of floats": picture_bytes("TIFF", "F"),
    "a palette GIF": picture_bytes("GIF", "P"),
    "a WEBP with alpha": picture_bytes("WEBP", "RGBA"),
    "a LAB TIFF": picture_bytes("TIFF", "LAB"),
}


def cases() -> list[Case]:
    """All of them; a file's ending is never what tells its format."""
    found = [Case(KIND, wrong, make, both, (word,)) for wrong, (make, word) in REFUSED.items()]
    for format in FORMATS:
        name, whole = f"a.{ENDINGS.get(format, format.lower())}", picture_bytes(format)
        for part, size in (
            ("its first 9 bytes", 9),
            ("half of it", len(whole) // 2),
            ("all but 40 bytes", len(whole) - 40),
        ):
            found.append(Case(KIND, f"{format}: {part}", file_of(whole[:size], name), both, ("a whole image", name)))
        wrong = bytes(byte ^ 0xFF for byte in whole[:4]) + whole[4:]
        found.append(Case(KIND, f"{format}: a wrong beginning", file_of(wrong, name), both, ("a whole image",)))
    for format, data in giants().items():
        found.append(Case(KIND, f"{format}: a giant by its header", file_of(data, "giant.img"), both, ("pixels",)))
    for format in ("GIF", "PNG", "TIFF", "WEBP"):
        found.append(Case(KIND, f"{format}: animated", file_of(animated(format), "a.img"), both, ("a still image",)))
    return found
