"""The gallery: a picture, its question, and the candidates as they were judged."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from srcfast.data.images import load_image, resolve
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Sample
from srcfast.errors import InputError
from srcfast.report.run_files import RunFiles
from srcfast.report.sections import NOT_MEASURED, case_name

MOST_CARDS = 24
MOST_PIXELS = 352  # a side of an embedded image
SMALL = 128  # images below this are enlarged without blur


def gallery(run: RunFiles) -> str:
    """One card a sample, chosen and rejected candidate first, the others folded away."""
    if not run.gallery:
        return NOT_MEASURED
    return "".join(_card(entry, run.path) for entry in run.gallery[:MOST_CARDS])


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


def _card(entry: dict[str, Any], root: Path) -> str:
    chosen, rejected = entry.get("chosen"), entry.get("rejected")
    candidates = list(enumerate(entry["candidates"]))
    shown = [pair for pair in candidates if pair[0] in (chosen, rejected)]
    shown.sort(key=lambda pair: pair[0] != chosen)
    others = [pair for pair in candidates if pair[0] not in (chosen, rejected)]
    others.sort(key=lambda pair: -pair[1]["score"])
    marks = {chosen: "chosen", rejected: "rejected"}
    parts = [_candidate(candidate, marks[index]) for index, candidate in shown]
    if others:
        inside = "".join(_candidate(candidate) for _, candidate in others)
        fold = (
            f"<details><summary>{len(others)} other candidate{'s' if len(others) > 1 else ''}</summary>{inside}</details>"
            if shown
            else inside
        )
        parts.append(fold)
    confidence = entry.get("confidence")
    said = [f"gold answer <b>{escape(str(entry['gold']))}</b>"]
    if confidence is not None:
        said.append(f"confidence of the pair {confidence:.2f}")
    if entry.get("iteration") is not None:
        said.append(f"iteration {escape(str(entry['iteration']))}")
    said.append(f"<code>{escape(str(entry['sample_id']))}</code>")
    head = "".join(f"<span>{item}</span>" for item in said)
    picture = embedded_image(_file_of(entry, root), entry["question"]) if entry.get("image") else ""
    return (
        f'<article class="card"><div>{picture}</div><div>'
        f"<h3>{escape(entry['question'])}</h3><div class=head>{head}</div>{''.join(parts)}</div></article>"
    )


def _candidate(candidate: dict[str, Any], mark: str = "") -> str:
    head = [f"<b>{mark}</b>"] if mark else []
    head.append(f"<span>score {candidate['score']:.2f}</span>")
    if candidate.get("case"):
        head.append(f"<span>{case_name(candidate['case'])}</span>")
    return f'<div class="candidate {mark}"><div class=head>{"".join(head)}</div>{response(candidate)}</div>'


def response(candidate: dict[str, Any]) -> str:
    """The text, each sentence with the oracle's verdict if there is one; as it stands if unreadable."""
    text = candidate["text"]
    parsed = parse_response(text)
    if parsed.answer is None:
        return f'<span class="sentence"><span class=kind>not parsed</span>{escape(text)}</span>'
    verdicts = {sentence: verdict for sentence, _, verdict in candidate.get("claims") or ()}
    html = [_sentences("sees", parsed.perception, verdicts), _sentences("thinks", parsed.reasoning, verdicts)]
    html.append(f'<span class="answer"><span class=kind>answers</span>{escape(parsed.answer)}</span>')
    return "".join(html)


def _sentences(kind: str, sentences: Sequence[str], verdicts: dict[str, str]) -> str:
    if not sentences:
        return ""
    inside = " ".join(_sentence(sentence, verdicts.get(sentence)) for sentence in sentences)
    return f'<span class="sentence"><span class=kind>{kind}</span>{inside}</span>'


def _sentence(sentence: str, verdict: str | None) -> str:
    if verdict not in ("true", "false", "unverifiable"):
        return escape(sentence)
    return f'<span class="{verdict}" title="the oracle: {verdict}">{escape(sentence)}</span>'


def embedded_image(path: Path, description: str) -> str:
    """An `img` that holds the picture itself, scaled down to MOST_PIXELS; a note where it can't be read."""
    try:
        picture = load_image(path.parent, path.name)
    except InputError:
        return '<div class="missing soft">image not available</div>'
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
    photo = max(picture.size) > SMALL
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG" if photo else "PNG", **({"quality": 85} if photo else {"optimize": True}))
    kind = "jpeg" if photo else "png"
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    style = "" if photo else " class=small"
    return f'<img{style} alt="{escape(description)}" src="data:image/{kind};base64,{data}">'
