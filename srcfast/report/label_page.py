"""Write a page on which a person judges pairs of candidates in a browser: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import json_hash, write_jsonl, write_text
from srcfast.data.rationale_format import ParsedResponse, parse_response
from srcfast.data.verdicts import pair_key, pair_row
from srcfast.report.gallery import embedded_image
from srcfast.report.page import templates
from srcfast.stages.judged_pairs import RunPair

MAX_PIXELS = 768  # of the longer side of a picture


def pairs_file(page: Path) -> Path:
    """Return the file beside a page that says which pairs it shows; answers are read with it."""
    return page.with_name(f"{page.name}.pairs.jsonl")


def write_label_page(page: Path, pairs: Sequence[RunPair], name: str) -> None:
    """Write a page of pairs, and the pairs beside it, which have what the R-Scorer says; the page has not."""
    rows = [pair_row(pair.sample, pair.first, pair.second) for pair in pairs]
    keys = [pair_key(row) for row in rows]
    shown = [
        {
            "key": key,
            "pair": pair,
            "pictures": [
                embedded_image(pair.sample.image_root / image, pair.sample.image_root, MAX_PIXELS)
                for image in pair.sample.images
            ],
            "candidates": [(text, _parsed(text)) for text in (pair.first, pair.second)],
        }
        for key, pair in zip(keys, pairs, strict=True)
    ]
    script_hash, style_hash = (
        _source_hash(templates().get_template(part).render()) for part in ("label.js", "label.css")
    )
    html = (
        templates()
        .get_template("label.html")
        .render(name=name, shown=shown, page_key=json_hash(keys), script_hash=script_hash, style_hash=style_hash)
    )
    write_jsonl(pairs_file(page), (_row(*each) for each in zip(keys, rows, pairs, strict=True)))
    write_text(page, html)


def _row(key: str, row: dict[str, Any], pair: RunPair) -> dict[str, Any]:
    return {"pair": key, **row, "chosen": pair.chosen, "scorer": pair.scorer}


def _parsed(text: str) -> ParsedResponse | None:
    """Return a response's parts; None where it has no answer, and is shown as it is."""
    parsed = parse_response(text)
    return parsed if parsed.answer is not None and parsed.has_rationale else None


def _source_hash(text: str) -> str:
    """Return the hash by which the content security policy allows a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
