"""Images come from below the dataset's root alone, and a hostile one is refused before it costs memory."""

from __future__ import annotations

import io
import json
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image, PngImagePlugin

from srcfast.data.images import MAX_BYTES, check_image, decode_image, load_image
from srcfast.data.jsonl import write_shards
from srcfast.data.readers import read_preferences, read_samples
from srcfast.errors import InputError
from srcfast.report.gallery import embedded_image
from srcfast.report.page import render
from srcfast.report.run_files import RunFiles

MiB = 1 << 20
LOADERS = (load_image, check_image)


def picture(width: int = 8, height: int = 6) -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dataset's root beside a secret image, with links that lead out of it and one that stays inside."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    (root / "below").mkdir(parents=True)
    secret.mkdir()
    picture().save(secret / "secret.png")
    picture().save(root / "below" / "inside.png")
    os.symlink(secret / "secret.png", root / "file.png")
    os.symlink("../secret/secret.png", root / "relative.png")
    os.symlink(root / "file.png", root / "twice.png")
    os.symlink(secret, root / "folder")
    os.symlink(root / "folder", root / "below" / "folder_twice")
    os.symlink("/", root / "everything")
    os.symlink(root / "below", root / "stays")
    return root


OUTSIDE = (
    "../secret/secret.png",
    "below/../../secret/secret.png",
    "SECRET",
    "/etc/passwd",
    "/proc/self/environ",
    "file.png",
    "relative.png",
    "twice.png",
    "folder/secret.png",
    "below/folder_twice/secret.png",
    "everything/etc/passwd",
    "file://SECRET",
    "http://localhost/a.png",
    "below/inside.png\0",
    "\0",
    "..\\secret\\secret.png",
    "C:\\secret.png",
    "\\\\host\\share\\secret.png",
    "a" * 300,
    "a/" * 3000,
    "~/secret.png",
    "$HOME/secret.png",
    "data:image/png;base64,AAAA",
)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_not_below_the_root_is_refused(root: Path, load: Callable, name: str) -> None:
    with pytest.raises(InputError) as refused:
        load(root, name.replace("SECRET", str(root.parent / "secret" / "secret.png")))
    assert refused.value.field == "image" and refused.value.fix


def test_a_folder_linked_within_the_root_is_followed(root: Path) -> None:
    assert load_image(root, "stays/inside.png").size == (8, 6)
    assert load_image(root, "below/../below/./inside.png").size == (8, 6)


@pytest.mark.parametrize("name", OUTSIDE)
def test_readers_set_records_aside_that_reach_out_of_the_root(root: Path, tmp_path: Path, name: str) -> None:
    image = name.replace("SECRET", str(root.parent / "secret" / "secret.png"))
    rows = [{"id": "good", "image": "below/inside.png"}, {"id": "bad", "image": image}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row | {"question": "q", "answer": "a"}) + "\n" for row in rows))
    rejected: list[dict] = []
    assert [one.id for one in read_samples(file, format="jsonl", image_root=root, rejected=rejected)] == ["good"]
    assert [row["line"] for row in rejected] == [2] and rejected[0]["field"] == "image"
    pairs = [row | {"prompt": "q", "chosen": "a", "rejected": "b"} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for format in ("jsonl", "trl"):
        rejected = []
        assert len(read_preferences(file, format=format, image_root=root, rejected=rejected)) == 1
        assert [row["line"] for row in rejected] == [2]


def test_a_command_with_an_image_from_outside_writes_nothing(
    srcfast: Callable[..., Result], sound_model: Path, root: Path, tmp_path: Path
) -> None:
    file, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps({"images": ["file.png"], "prompt": "what", "response": "red"}) + "\n")
    result = srcfast("logprob", "--model", sound_model, "--data", file, "--image-root", root, "--output", output)
    assert result.exit_code == 2 and "line 1" in result.output and not output.exists()


@pytest.mark.parametrize("own", ["/", "..", "SECRET", "ROOT/folder", 5, None, ["/"], "a\0"])
def test_pairs_that_name_a_root_of_their_own_stay_below_the_one_given(
    srcfast: Callable[..., Result], sound_model: Path, root: Path, tmp_path: Path, own: object
) -> None:
    """Shards carry their images' folder; from someone else's, --image-root holds."""
    if isinstance(own, str):
        own = own.replace("SECRET", str(tmp_path / "secret")).replace("ROOT", str(root))
    row = {"sample_id": "s", "images": ["secret.png"], "prompt": "what", "chosen": "red", "rejected": "blue"}
    write_shards(tmp_path / "pairs", [row | {"image_root": own}])
    words = ("--model", sound_model, "--data", tmp_path / "pairs", "--output", tmp_path / "out")
    result = srcfast("dpo", *words, "--image-root", root)
    assert result.exit_code == 2 and "line 1, field 'image_root'" in result.output, (result.output, result.exception)
    assert not (tmp_path / "out").exists()


# Hostile files -------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*extra: bytes, width: int = 4, height: int = 4, data: bytes | None = None) -> bytes:
    """A grey PNG with chunks of one's own before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(b"\0" * ((width + 1) * height)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def swelling(size: int) -> bytes:
    return zlib.compress(b"\0" * size, 9)


HOSTILE = {
    "zTXt": png(chunk(b"zTXt", b"a\0\0" + swelling(200 * MiB))),
    "iTXt": png(chunk(b"iTXt", b"a\0\1\0\0\0" + swelling(200 * MiB))),
    "iCCP": png(chunk(b"iCCP", b"a\0\0" + swelling(200 * MiB))),
    "many zTXt": png(*(chunk(b"zTXt", b"a%d\0\0" % n + swelling(MiB - 1)) for n in range(200))),
    "pixels that the header denies": png(width=4, height=4, data=swelling(200 * MiB)),
    "60,000 by 60,000": png(width=60_000, height=60_000, data=swelling(MiB)),
    "two thousand million by one": png(width=2**31 - 1, height=1, data=b""),
    "no width": png(width=0, height=4, data=b""),
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_what_swells_on_decoding_is_refused_or_costs_no_memory(tmp_path: Path, load: Callable, name: str) -> None:
    (tmp_path / "a.png").write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        load(tmp_path, "a.png")
    except InputError as refused:
        assert refused.field == "image"
    else:
        assert name in ("pixels that the header denies", "iCCP"), "harmless: decoders stop at what they were told"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 80 * MiB


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_refused_by_name(tmp_path: Path, load: Callable, format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a", format, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"expected a still image, found several frames"):
        load(tmp_path, "a")


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("format", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "ICNS", "DDS"])
def test_formats_beside_the_named_ones_are_refused_whatever_the_ending(
    tmp_path: Path, load: Callable, format: str
) -> None:
    """EPS and PDF are programs; the others' decoders are little used and not needed."""
    picture(16, 16).save(tmp_path / "a.png", format)
    with pytest.raises(InputError, match="expected a whole image"):
        load(tmp_path, "a.png")


@pytest.mark.parametrize("load", LOADERS)
def test_no_more_than_the_limit_is_read_of_a_file(tmp_path: Path, load: Callable) -> None:
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(20 * MAX_BYTES)  # takes no room on disk
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=f"at most {MAX_BYTES:,} bytes"):
            load(tmp_path, "a.png")
        assert tracemalloc.get_traced_memory()[1] < 2 * MAX_BYTES
    finally:
        tracemalloc.stop()


def test_metadata_of_a_sound_image_is_read_past() -> None:
    """Text, a wrong colour profile and an EXIF block of noise spoil no picture."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 1000, zip=True)
    info.add_itxt("comment", "\x1b[31m", "en", "comment")
    buffer = io.BytesIO()
    picture().save(buffer, "PNG", pnginfo=info, icc_profile=b"no profile")
    assert np.array_equal(np.asarray(decode_image(buffer.getvalue(), "a.png")), np.asarray(picture()))


@pytest.mark.parametrize("name", ["60,000 by 60,000", "zTXt"])
def test_the_page_reads_its_pictures_under_the_same_limits(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes(HOSTILE[name])
    assert embedded_image(tmp_path / "a.png") is None
    picture(16, 16).save(tmp_path / "b.png", "EPS")
    assert embedded_image(tmp_path / "b.png") is None
    assert embedded_image(Path("/etc/passwd")) is None
    picture(16, 16).save(tmp_path / "c.png")
    assert embedded_image(tmp_path / "c.png") is not None
    entry = {"sample_id": "s", "question": "what", "gold": "a", "candidates": []}
    entries = [entry | {"image": name} for name in ("a.png", "b.png", "/etc/passwd", "c.png")]
    html = render(RunFiles(tmp_path, {}, [], entries, {}, {}))
    assert html.count("image not available") == 3 and html.count("<img") == 1
