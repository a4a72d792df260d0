"""Images from a dataset's folder: never from outside of it, never larger than a limit, never half of one."""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from srcfast.errors import InputError

MAX_PIXELS = 50_000_000
MAX_BYTES = 64 << 20
ORIENTATION, QUARTER_TURNS = int(ExifTags.Base.Orientation), (5, 6, 7, 8)  # in Exif
BITS, PHOTOMETRIC, SAMPLE_FORMAT, LOWEST, HIGHEST = 258, 262, 339, 340, 341  # tags of TIFF
# Raster formats that Pillow decodes by itself: EPS, for one, is a program that it would hand to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def load_image(root: Path, name: str) -> Image.Image:
    """Open, decode and turn upright (EXIF) an image below `root`, as RGB.

    Raises:
        InputError: it is missing, outside of `root` (`..`, absolute paths and symbolic links included), no image,
            broken or truncated, animated, larger than the limits, or has wide values of an unknown range.
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
    data = _read(file)
    with _opened(data, file) as image:
        image.draft("L", (image.width // 8 or 1, image.height // 8 or 1))
        _upright_rgb(image, data, file)


def decode_image(data: bytes, name: str | Path) -> Image.Image:
    """Decode bytes to an upright RGB image; errors name `name`. Raises InputError as `load_image` does."""
    with _opened(data, name) as image:
        return _upright_rgb(image, data, name)


def image_suffix(data: bytes, name: str | Path) -> str:
    """Return the file ending of image bytes that decode, such as ".png". Raises InputError as `load_image` does."""
    with _opened(data, name) as image:
        _upright_rgb(image, data, name)
        return {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2"}.get(image.format or "", f".{image.format}".lower())


def resolve(root: Path, name: str, follow_links: bool = False) -> Path:
    """Resolve the file `name` below `root`; with `follow_links` links may lead out of it.

    Raises:
        InputError: it is missing or lies outside.
    """
    base = Path(root).resolve()
    try:
        file = (base / name).resolve()
        inside = (Path(os.path.normpath(base / name)) if follow_links else file).is_relative_to(base)
        exists = file.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name too long, a loop of links
        raise _error(repr(name), f"an image file below {base}", error, "correct the path") from error
    if not inside:
        raise _error(name, f"a path below {base}", file, "move the image into the image root, or name another root")
    if not exists:
        found = "a folder" if file.is_dir() else "no such file"
        raise _error(file, "an image file", found, "correct the path, or set the image root")
    return file


def locate(roots: Sequence[Path], names: Sequence[str], follow_links: bool) -> tuple[Path, tuple[str, ...]]:
    """Find each image below the first root that has it, and return the innermost root of all these files, and their paths there.

    Where they lie below several, or links lead out of theirs, return the folder that the files share, and their paths there.

    Raises:
        InputError: there are several roots, or links are followed, and an image is below no root.
    """
    if not names or (len(roots) == 1 and not follow_links):
        return roots[0], tuple(names)
    files = [_below_any(roots, name, follow_links) for name in names]
    shared = Path(os.path.commonpath([file.parent for file in files]))
    inside = [root for root in roots if shared.is_relative_to(root.resolve())]
    root = max(inside, key=lambda root: len(root.resolve().parts), default=shared)
    return root, tuple(str(file.relative_to(root.resolve())) for file in files)


def _below_any(roots: Sequence[Path], name: str, follow_links: bool) -> Path:
    """Resolve an image below the first of these roots that has it. Raises the first root's InputError where none has."""
    errors = []
    for root in roots:
        try:
            return resolve(root, name, follow_links)
        except InputError as error:
            errors.append(error)
    raise errors[0]


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


def _upright_rgb(image: Image.Image, data: bytes, name: str | Path) -> Image.Image:
    """Decode an image to upright RGB, on white where it is transparent, as transformers' processors do.

    Raises:
        InputError: its values have more than 8 bits, and nothing says which of them is white: it might come out black.
    """
    image.load()
    upright, tags = ImageOps.exif_transpose(image), getattr(image, "tag_v2", {})
    is_png, is_wide = image.format == "PNG", image.mode[0] in "IF"
    bits = data[24] if is_png else max(tags.get(BITS, (8,)))
    is_signed = image.mode == "F" or not {2, 3}.isdisjoint(tags.get(SAMPLE_FORMAT, ()))  # or floating-point
    if is_wide or is_signed or bits > 8:
        # Of several channels Pillow has the upper 8 bits alone.
        values = np.asarray(upright, np.float64) if is_wide else np.asarray(upright.convert("RGB")) * 256.0
        low, high, peak = 0.0, float(1 << bits if 8 < bits < 16 else 1 << 16) - 1, values.max()
        is_known = not is_signed and bits <= 16
        if is_wide and HIGHEST in tags:
            low, high, is_known = float(min(tags.get(LOWEST, (0,)))), float(max(tags[HIGHEST])), True
        elif image.mode == "F":  # as Pillow reads it, unless it were nearly black, as from 0 to 1
            high, is_known = 255.0, peak >= 16
        elif is_known and peak < 1 << 12 <= high and image.format != "PPM":  # Pillow scales a PPM by its maximum
            significant = _significant_bits(data) if is_png else 0
            is_known = significant == 16 or (is_wide and (significant > 0 or peak == 0))
            # Shifted up, as PNG has it, or left as they were?
            if is_known and peak < 1 << significant and (values % (1 << 16 - significant)).any():
                high = float(1 << significant) - 1
        if not (is_known and 0 < high - low < np.inf and low <= values.min() and peak <= high):
            expected = "values of 8 bits, or of a range that the file says (sBIT in PNG, SMaxSampleValue in TIFF)"
            fix = "save it in 8 bits, its values scaled to 0 to 255"
            raise _error(name, expected, f"values from {values.min():g} to {peak:g} in Pillow's mode {image.mode}", fix)
        if is_wide:
            scaled = np.minimum((values - low) * (256 / (high - low + (image.mode != "F"))), 255).astype(np.uint8)
            return Image.fromarray(255 - scaled if tags.get(PHOTOMETRIC) == 0 else scaled).convert("RGB")
    if "A" in upright.getbands() or "transparency" in upright.info:
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
    return upright.convert("RGB")


def _significant_bits(data: bytes) -> int:
    """Return how many bits of the first channel count by a PNG's chunk sBIT; 0 without one."""
    start = 33  # behind the header
    while (name := data[start + 4 : start + 8]) not in (b"sBIT", b"IDAT", b""):
        start += 12 + int.from_bytes(data[start : start + 4])
    return data[start + 8] if name == b"sBIT" else 0


def _error(file: str | Path, expected: str, found: object, fix: str) -> InputError:
    return InputError(file=file, field="image", expected=expected, found=found, fix=fix)
