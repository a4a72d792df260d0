"""Images from a dataset's folder: never from outside of it, never larger than a limit, never half of one."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from srcfast.errors import InputError

MAX_PIXELS = 50_000_000
MAX_BYTES = 64 << 20


def load_image(root: Path, name: str) -> Image.Image:
    """Open, decode and turn upright (EXIF) an image below `root`, as RGB.

    Raises:
        InputError: it is missing, outside of `root` (`..`, absolute paths and symbolic links included), broken or
            truncated, animated, or larger than the limits.
    """
    file = resolve(root, name)
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise _error(file, f"at most {MAX_BYTES:,} bytes", f"{size:,} bytes", "shrink the image")
    return decode_image(file.read_bytes(), file)


def resolve(root: Path, name: str) -> Path:
    """The file `name` below `root`. Raises InputError where it is missing or lies outside."""
    base = Path(root).resolve()
    try:
        file = (base / name).resolve()
        inside, exists = file.is_relative_to(base), file.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name too long, a loop of links
        raise _error(name, f"an image file below {base}", error, "correct the path") from error
    if not inside:
        raise _error(name, f"a path below {base}", file, "move the image into the image root, or name another root")
    if not exists:
        raise _error(file, "an image file", "no such file", "correct the path, or set the image root")
    return file


def decode_image(data: bytes, name: str | Path) -> Image.Image:
    """Decode bytes to an upright RGB image; `name` is for the errors. Raises InputError as `load_image` does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    found = f"{image.width} x {image.height} pixels"
                    raise _error(name, f"at most {MAX_PIXELS:,} pixels", found, "shrink the image")
                if getattr(image, "n_frames", 1) > 1:
                    raise _error(name, "a still image", f"{image.n_frames} frames", "keep one frame")
                image.load()
                return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _error(name, f"at most {MAX_PIXELS:,} pixels", error, "shrink the image") from error
    except InputError:
        raise
    except Exception as error:  # decoders raise whatever they meet first: OSError, SyntaxError, struct.error, ...
        raise _error(name, "a whole image", error or type(error).__name__, "replace the file") from error


def from_base64(text: str, name: str) -> bytes:
    """The bytes of a base64 image. Raises InputError where it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _error(name, "an image in base64", error, "encode the image again") from error


def _error(file: str | Path, expected: str, found: object, mend: str) -> InputError:
    return InputError(file=file, field="image", expected=expected, found=found, mend=mend)
