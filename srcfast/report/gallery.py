"""The gallery: a picture, its question, and the candidates as they were judged."""

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

MOST_CARDS = 24
MOST_PIXELS = 352  # a side of an embedded image
SMALL = 128  # images below this are enlarged without blur
VERDICTS = ("true", "false", "unverifiable")
Sentences = list[tuple[str, str | None]]  # with the oracle's verdict, one of VERDICTS, where there is one


@dataclass(frozen=True)
class Picture:
    uri: str  # holds the picture itself
    small: bool  # below SMALL on both sides


@dataclass(frozen=True)
class Candidate:
    """A response as it was judged. `answer` is None, and there are no sentences, where the text does not parse."""

    text: str
    score: float
    case: str | None
    mark: str  # chosen, rejected or empty
    answer: str | None
    perception: Sentences
    reasoning: Sentences


@dataclass(frozen=True)
class Card:
    """A sample with its candidates: first the pair, the chosen one before the rejected one, then the others by score."""

    sample_id: Any
    question: str
    gold: Any
    confidence: float | None
    iteration: Any
    has_image: bool
    picture: Picture | None  # None: there is no image, or it can't be read
    pair: list[Candidate]
    others: list[Candidate]


def cards(run: RunFiles) -> list[Card]:
    """Return one card for each entry of the gallery, MOST_CARDS at most."""
    return [_card(entry, run.path) for entry in run.gallery[:MOST_CARDS]]


def image_names(sample: Sample, run: Path, output: Path) -> dict[str, str | None]:
    """The fields by which `gallery.json` names a sample's first image, so that the page finds it in a run that was moved, too.

    Args:
        sample: whose image.
        run: the run's directory.
        output: the folder that the run lies in, with the images that were drawn for it: these are moved together.

    Returns:
        `image`: its path from the run's directory where it lies in `output`; None where there is none. Else its whole path,
        which stays right when the run alone is moved, and as `image_from_run` the one that stays right when all is.
    """
    if not sample.images:
        return {"image": None}
    image = (sample.image_root / sample.images[0]).resolve()
    from_run = os.path.relpath(image, run.resolve())
    if image.is_relative_to(output.resolve()):
        return {"image": from_run}
    return {"image": str(image), "image_from_run": from_run}


def _file_of(entry: dict[str, Any], run: Path) -> Path:
    """The image of an entry of the gallery; where the run was moved with all its data, by the path from its directory."""
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

    def judged(sentences: Sequence[str]) -> Sentences:
        return [(sentence, verdicts.get(sentence)) for sentence in sentences]

    return Candidate(
        text=entry["text"],
        score=entry["score"],
        case=entry.get("case"),
        mark=mark,
        answer=parsed.answer,
        perception=judged(parsed.perception),
        reasoning=judged(parsed.reasoning),
    )


def embedded_image(path: Path) -> Picture | None:
    """Return the picture scaled down to MOST_PIXELS, as a `data:` URI; None where it can't be read."""
    try:
        picture = load_image(path.parent, path.name)
    except InputError:
        return None
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
    photo = max(picture.size) > SMALL
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG" if photo else "PNG", **({"quality": 85} if photo else {"optimize": True}))
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/{'jpeg' if photo else 'png'};base64,{data}", small=not photo)
