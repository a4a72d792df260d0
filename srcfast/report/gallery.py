"""Build the page's gallery: cards with an image, its question, and the scored candidates."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.data.images import load_image, resolve
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Sample
from srcfast.errors import InputError
from srcfast.report.run_files import RunFiles

MAX_CARDS = 24
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

    text: str
    score: float
    case: str | None
    mark: str  # chosen, rejected or empty
    answer: str | None
    perception: Sentences
    reasoning: Sentences


@dataclass(frozen=True)
class Card:
    """A sample with its candidates: the pair, chosen before rejected, then the others by descending score."""

    sample_id: Any
    question: str
    gold: Any
    confidence: float | None
    iteration: Any
    has_image: bool
    picture: Picture | None  # None: the sample has no image, or its file can't be read
    pair: list[Candidate]
    others: list[Candidate]


def cards(run: RunFiles) -> list[Card]:
    """Build one card for each entry of the gallery, at most MAX_CARDS."""
    return [_card(entry, run.path) for entry in run.gallery[:MAX_CARDS]]


def image_names(sample: Sample, run: Path, output: Path) -> dict[str, str | None]:
    """Return the fields of `gallery.json` that name a sample's first image, so that it is also read after a run was moved.

    Args:
        sample: the sample.
        run: the run's directory.
        output: the directory that holds the run and the images drawn for it, which are moved together.

    Returns:
        `image`: None for a sample without images; the path from the run's directory for an image in `output`; for any other the
        absolute path, which stays valid when the run alone is moved, and `image_from_run`, the path from the run's directory,
        which stays valid when run and data are moved together.
    """
    if not sample.images:
        return {"image": None}
    image = (sample.image_root / sample.images[0]).resolve()
    from_run = os.path.relpath(image, run.resolve())
    if image.is_relative_to(output.resolve()):
        return {"image": from_run}
    return {"image": str(image), "image_from_run": from_run}


def _file_of(entry: dict[str, Any], run: Path) -> Path:
    """Return the path of an entry's image: `image` if that file exists, else `image_from_run`."""
    file = run / entry["image"]
    try:
        resolve(file.parent, file.name)
    except InputError:
        return run / entry.get("image_from_run", entry["image"])
    return file


def _card(entry: dict[str, Any], root: Path) -> Card:
    marks = {entry.get("chosen"): "chosen", entry.get("rejected"): "rejected"}
    candidates = [_candidate(candidate, marks.get(index, "")) for index, candidate in enumerate(entry["candidates"])]
    pair = [candidate for candidate in candidates if candidate.mark]
    others = [candidate for candidate in candidates if not candidate.mark]
    has_image = bool(entry.get("image"))
    return Card(
        sample_id=entry["sample_id"],
        question=entry["question"],
        gold=entry["gold"],
        confidence=entry.get("confidence"),
        iteration=entry.get("iteration"),
        has_image=has_image,
        picture=embedded_image(_file_of(entry, root)) if has_image else None,
        pair=sorted(pair, key=lambda candidate: candidate.mark != "chosen"),
        others=sorted(others, key=lambda candidate: -candidate.score),
    )


def _candidate(entry: dict[str, Any], mark: str) -> Candidate:
    parsed = parse_response(entry["text"])
    verdicts = {sentence: verdict for sentence, _, verdict in entry.get("claims") or () if verdict in VERDICTS}

    def with_verdicts(sentences: Sequence[str]) -> Sentences:
        return [(sentence, verdicts.get(sentence)) for sentence in sentences]

    return Candidate(
        text=entry["text"],
        score=entry["score"],
        case=entry.get("case"),
        mark=mark,
        answer=parsed.answer,
        perception=with_verdicts(parsed.perception),
        reasoning=with_verdicts(parsed.reasoning),
    )


def embedded_image(path: Path) -> Picture | None:
    """Read an image, scale it down to MAX_PIXELS, and encode it as a `data:` URI. Returns None if it can't be read."""
    try:
        picture = load_image(path.parent, path.name)
    except InputError:
        return None
    picture.thumbnail((MAX_PIXELS, MAX_PIXELS))
    photo = max(picture.size) > SMALL
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG" if photo else "PNG", **({"quality": 85} if photo else {"optimize": True}))
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/{'jpeg' if photo else 'png'};base64,{data}", small=not photo)
