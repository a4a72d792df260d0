"""Images from a dataset's folder: never from outside of it, never larger than a limit, never half of one."""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from srcfast.errors import InputError

MAX_PIXELS = 50_000_000
MAX_BYTES = 64 << 20
ORIENTATION, QUARTER_TURNS = int(ExifTags.Base.Orientation), (5, 6, 7, 8)  # in Exif
# Raster formats that Pillow decodes by itself: EPS, for one, is a program that it would hand to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def load_image(root: Path, name: str) -> Image.Image:
    """Open, decode and turn upright (EXIF) an image below `root`, as RGB.

    Raises:
        InputError: it is missing, outside of `root` (`..`, absolute paths and symbolic links included), no image,
            broken or truncated, animated, or larger than the limits.
    """
    file = resolve(root, name)
    return decode_image(_read(file), file)


@dataclass(frozen=True)
class ImageFile:
    """An image of which only the header has been read: its size when upright, in pixels."""

    root: Path
    name: str
    width: int
    height: int

    def load(self) -> Image.Image:
        """Read and decode it, see `load_image`."""
        return load_image(self.root, self.name)


def image_file(root: Path, name: str) -> ImageFile:
    """Read the upright size of an image below `root` from its header; of a PNG with metadata from the whole file.

    Raises:
        InputError: as `load_image`, but for pixels that are broken.
    """
    file = resolve(root, name)
    data = _read(file)
    with _opened(data, file) as image:
        width, height = image.size
        # Pillow decodes a PNG to look for its metadata, which may lie behind the pixels; a TIFF's size is the upright one.
        has_metadata = image.format != "PNG" or any(mark in data for mark in (b"eXIf", b"exif", b"xmp"))
        if has_metadata and image.format != "TIFF" and image.getexif().get(ORIENTATION) in QUARTER_TURNS:
            width, height = height, width
        return ImageFile(root, name, width, height)


def check_image(root: Path, name: str) -> None:
    """Raise what `load_image` would raise, at a fraction of its cost (a JPEG is decoded at an eighth of its size)."""
    file = resolve(root, name)
    with _opened(_read(file), file) as image:
        image.draft("L", (image.width // 8 or 1, image.height // 8 or 1))
        image.load()


def decode_image(data: bytes, name: str | Path) -> Image.Image:
    """Decode bytes to an upright RGB image; errors name `name`. Raises InputError as `load_image` does."""
    with _opened(data, name) as image:
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


def image_suffix(data: bytes, name: str | Path) -> str:
    """Return the file ending of image bytes that decode, such as ".png". Raises InputError as `load_image` does."""
    with _opened(data, name) as image:
        image.load()
        return {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2"}.get(image.format or "", f".{image.format}".lower())


def resolve(root: Path, name: str) -> Path:
    """Resolve the file `name` below `root`. Raises InputError where it is missing or lies outside."""
    base = Path(root).resolve()
    try:
        file = (base / name).resolve()
        inside, exists = file.is_relative_to(base), file.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name too long, a loop of links
        raise _error(repr(name), f"an image file below {base}", error, "correct the path") from error
    if not inside:
        raise _error(name, f"a path below {base}", file, "move the image into the image root, or name another root")
    if not exists:
        found = "a folder" if file.is_dir() else "no such file"
        raise _error(file, "an image file", found, "correct the path, or set the image root")
    return file


def from_base64(text: str, name: str) -> bytes:
    """Decode base64, which may have line breaks, to an image's bytes. Raises InputError where it is none, or too long."""
    if len(text) > MAX_BYTES * 3 // 2:
        raise _error(name, f"at most {MAX_BYTES:,} bytes", f"{len(text):,} of base64", "shrink the image")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _error(name, "an image in base64", error, "encode the image again") from error


def _read(file: Path) -> bytes:
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            data = opened.read(min(size, MAX_BYTES) + 1)  # bounded here: a file may grow after its size was asked for
    except OSError as error:
        raise _error(file, "a readable file", error.strerror or error, "correct its permissions") from error
    if len(data) > MAX_BYTES:
        raise _error(file, f"at most {MAX_BYTES:,} bytes", "more", "shrink the image")
    return data


@contextmanager
def _opened(data: bytes, name: str | Path) -> Iterator[Image.Image]:
    """Open an image and check its header; whatever its decoder raises, here or later, becomes an InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the limit below is stricter than Pillow's warning
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    found = f"{image.width} x {image.height} pixels"
                    raise _error(name, f"at most {MAX_PIXELS:,} pixels", found, "shrink the image")
                # Phones write a preview behind a JPEG's picture (MPO): no animation.
                if getattr(image, "is_animated", False) and image.format != "MPO":
                    raise _error(name, "a still image", "several frames", "keep one frame")
                yield image
    except Image.DecompressionBombError as error:
        raise _error(name, f"at most {MAX_PIXELS:,} pixels", error, "shrink the image") from error
    except InputError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        found = "none of them" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise _error(name, f"a whole image ({', '.join(FORMATS)})", found, "replace the file") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would cut off at 255 instead of scaling
        return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    return image.convert("RGB")


def _error(file: str | Path, expected: str, found: object, fix: str) -> InputError:
    return InputError(file=file, field="image", expected=expected, found=found, fix=fix)
