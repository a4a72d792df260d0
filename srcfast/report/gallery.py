"""Build the page's gallery: cards with images, their question, and the scored candidates."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.data.images import load_image
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Sample
from srcfast.errors import InputError
from srcfast.report import shapes
from srcfast.report.run_files import RunFiles

MAX_CARDS = 24
MAX_IMAGES = 4  # of a card
MAX_PIXELS = 352  # of the longer side of an embedded image
SMALL = 128  # pixels; images up to this size are enlarged without blur, and embedded as PNG
VERDICTS = ("true", "false", "unverifiable")
Sentences = list[tuple[str, str | None]]  # sentence and the oracle's verdict, one of VERDICTS or None


@dataclass(frozen=True)
class Picture:
    """An image embedded in the page."""

    uri: str  # a `data:` URI with the whole image
    small: bool  # at most SMALL pixels on both sides


@dataclass(frozen=True)
class Candidate:
    """A scored response. If its text does not parse, `answer` is None and there are no sentences."""

    entry: shapes.Candidate
    mark: str  # chosen, rejected or empty
    answer: str | None
    perception: Sentences
    reasoning: Sentences


@dataclass(frozen=True)
class Card:
    """A sample with its candidates: the pair, chosen before rejected, then the others by descending score."""

    entry: shapes.Card
    pictures: list[Picture | None]  # None: an image whose file can't be read
    pair: list[Candidate]
    others: list[Candidate]


def cards(run: RunFiles, image_roots: Iterable[Path] | None = None) -> list[Card]:
    """Build one card for each entry of the gallery, at most MAX_CARDS.

    Args:
        run: the run's files.
        image_roots: directories whose images are shown beside those in the run's: the gallery may name any file; None: all.
    """
    roots = [Path("/")] if image_roots is None else [run.path, *image_roots]
    return [_card(shapes.Card.model_validate(entry), run.path, roots) for entry in run.gallery[:MAX_CARDS]]


def image_names(sample: Sample, run: Path, output: Path) -> dict[str, Any]:
    """Return the fields of `gallery.json` that name a sample's images, so that they are also read after a run was moved.

    Args:
        sample: the sample.
        run: the run's directory.
        output: the directory that holds the run and the images drawn for it, which are moved together.

    Returns:
        `image`: None for a sample without images; the path from the run's directory for an image in `output`; for any other the
        absolute path, which stays valid when the run alone is moved, and `image_from_run`, the path from the run's directory,
        which stays valid when run and data are moved together. `further_images`: the same of further images, up to MAX_IMAGES
        in all, where there are some.
    """
    names = [_names(sample.image_root / image, run, output) for image in sample.images[:MAX_IMAGES]]
    return (names[0] if names else {"image": None}) | ({"further_images": names[1:]} if names[1:] else {})


def _names(image: Path, run: Path, output: Path) -> dict[str, Any]:
    image = image.resolve()
    from_run = os.path.relpath(image, run.resolve())
    if image.is_relative_to(output.resolve()):
        return {"image": from_run}
    return {"image": str(image), "image_from_run": from_run}


def _picture(image: shapes.Image, run: Path, roots: Sequence[Path]) -> Picture | None:
    """Embed an image: `image` if that file is there and below a root, else `image_from_run`."""
    names = [name for name in (image.image, image.image_from_run) if name]
    pictures = (embedded_image(run / name, root) for name in names for root in roots)
    return next((picture for picture in pictures if picture is not None), None)


def _card(entry: shapes.Card, run: Path, roots: Sequence[Path]) -> Card:
    marks = {entry.chosen: "chosen", entry.rejected: "rejected"}
    candidates = [_candidate(candidate, marks.get(index, "")) for index, candidate in enumerate(entry.candidates)]
    pair = [candidate for candidate in candidates if candidate.mark]
    others = [candidate for candidate in candidates if not candidate.mark]
    return Card(
        entry,
        [_picture(image, run, roots) for image in (entry, *entry.further_images)[:MAX_IMAGES] if image.image],
        pair=sorted(pair, key=lambda candidate: candidate.mark != "chosen"),
        others=sorted(others, key=lambda candidate: -candidate.entry.score),
    )


def _candidate(entry: shapes.Candidate, mark: str) -> Candidate:
    parsed = parse_response(entry.text)
    verdicts = {sentence: verdict for sentence, _, verdict in entry.claims or () if verdict in VERDICTS}

    def with_verdicts(sentences: Sequence[str]) -> Sentences:
        return [(sentence, verdicts.get(sentence)) for sentence in sentences]

    return Candidate(entry, mark, parsed.answer, with_verdicts(parsed.perception), with_verdicts(parsed.reasoning))


def embedded_image(path: Path, root: Path = Path("/"), max_pixels: int = MAX_PIXELS) -> Picture | None:
    """Read an image below `root`, scale it down to `max_pixels` of its longer side, and encode it as a `data:` URI.

    Returns None if it can't be read.
    """
    try:
        picture = load_image(root, str(path.absolute()))
    except InputError:
        return None
    picture.thumbnail((max_pixels, max_pixels))
    photo = max(picture.size) > SMALL
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG" if photo else "PNG", **({"quality": 85} if photo else {"optimize": True}))
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/{'jpeg' if photo else 'png'};base64,{data}", small=not photo)
