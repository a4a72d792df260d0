"""The gallery: a picture, its question, and the candidates as they were judged."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from srcfast.data.images import load_image
from srcfast.data.rationale_format import parse_response
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
    picture = embedded_image(root / entry["image"], entry["question"]) if entry.get("image") else ""
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
