"""The commands `label write` and `label read`: a page that loads nothing, and answers that become verdicts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from helpers.judged_run import write_judged_run

from srcfast.data.verdicts import read_verdicts

Srcfast = Callable[..., Result]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> {0}"


class Tags(HTMLParser):
    """Collects tags with attributes, and the text of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside in self.texts:
            self.texts[self.inside].append(data)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(folder: Path, srcfast: Srcfast, *more: object, **run: Any) -> Path:
    directory = write_judged_run(folder, **run)
    result = srcfast("label", "write", directory, "--output", folder / "page.html", *more)
    assert result.exit_code == 0, result.output
    return folder / "page.html"


def test_the_page_shows_text_as_text_and_loads_nothing(tmp_path: Path, srcfast: Srcfast) -> None:
    texts = ("It is red.", HOSTILE)
    page = written(tmp_path, srcfast, count=3, texts=texts, question="<b>Which</b>?", facts=["<i>so</i>"])
    html = page.read_text(encoding="utf-8")
    tags = Tags(html)
    assert len([tag for tag, _ in tags.tags if tag == "article"]) == 3
    assert [tag for tag, _ in tags.tags if tag in ("script", "style", "b", "i")].count("script") == 1
    assert not {tag for tag, _ in tags.tags} & {"a", "link", "iframe", "object", "form", "i", "base"}
    for tag, attributes in tags.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert all(
            str(attributes[name]).startswith("data:image/png;") for name in ("src", "href") if name in attributes
        )
        assert tag != "img" or str(attributes["alt"]).startswith("picture")
    assert sum(tag == "img" for tag, _ in tags.tags) == 3
    [policy] = [attributes["content"] for tag, attributes in tags.tags if "http-equiv" in attributes]
    sources = ["".join(tags.texts[name]) for name in ("script", "style")]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in sources]
    assert policy == (
        f"default-src 'none'; img-src data:; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'"
    )
    assert not re.search(r"https?://", html)


def test_what_the_scorer_says_is_in_the_file_beside_the_page_alone(tmp_path: Path, srcfast: Srcfast) -> None:
    confidence = {f"s{n}": [0.101 + n, 0.2, 0.3] for n in range(1)}
    page = written(tmp_path, srcfast, "--pairs", "4", "--seed", "3", count=2, scores=confidence)
    rows = lines(page.with_name("page.html.pairs.jsonl"))
    assert len(rows) == 4 and sorted(row["chosen"] for row in rows) == ["random"] * 3 + ["unsure"]
    assert {row["scorer"] for row in rows} <= {0.75, 0.25, None}
    html = page.read_text(encoding="utf-8")
    assert "0.75" not in html and "unsure" not in html
    keys = [attributes["data-pair"] for tag, attributes in Tags(html).tags if tag == "article"]
    assert keys == [row["pair"] for row in rows]


def answers(page: Path, by: str, verdict: Callable[[dict[str, Any]], str]) -> Path:
    rows = lines(page.with_name("page.html.pairs.jsonl"))
    file = page.with_name(f"{by}.jsonl")
    text = "".join(json.dumps({"pair": row["pair"], "verdict": verdict(row), "by": by}) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    return file


def test_answers_become_verdicts_with_a_report(tmp_path: Path, srcfast: Srcfast) -> None:
    page = written(tmp_path, srcfast, count=4, scores={f"s{n}": [0.5, 0.5, 0.5] for n in range(4)})
    rank = ["<see>", "It is b", "It is g"]  # in which the earlier candidate is the better one

    def better(row: dict[str, Any]) -> str:
        first, second = (
            next(i for i, start in enumerate(rank) if text.startswith(start)) for text in row["candidates"]
        )
        return "first" if first < second else "second"

    files = [answers(page, "anna", better), answers(page, "ben", better), answers(page, "carl", lambda row: "tie")]
    pairs, output = page.with_name("page.html.pairs.jsonl"), tmp_path / "verdicts.jsonl"
    result = srcfast("label", "read", *files, "--pairs", pairs, "--output", output)
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert json.loads((tmp_path / "verdicts.jsonl.agreement.json").read_text()) == report
    assert report["answers"] == {"anna": 12, "ben": 12, "carl": 12}
    assert [each["equal"] for each in report["people"]] == [1.0, 0.0, 0.0]
    assert report["scorer"]["random"] == {"pairs": 8, "same_side": 1.0}
    verdicts = read_verdicts(output)
    assert len(verdicts) == 12 and all(pair.verdict[1] == pytest.approx(1 / 3) for pair in verdicts)
    for pair, row in zip(verdicts, lines(output), strict=True):
        assert pair.verdict[0 if better(row) == "first" else 2] == pytest.approx(2 / 3)
        assert pair.sample.facts[0].startswith("It is ") and row["judges"] == ["anna", "ben", "carl"]


def test_a_changed_file_of_pairs_and_outputs_over_inputs_are_refused(tmp_path: Path, srcfast: Srcfast) -> None:
    page = written(tmp_path, srcfast, count=1)
    file, pairs = answers(page, "anna", lambda row: "tie"), page.with_name("page.html.pairs.jsonl")
    result = srcfast("label", "read", file, "--pairs", pairs, "--output", file)
    assert result.exit_code == 2 and "apart from the inputs" in result.output
    pairs.write_text(pairs.read_text().replace("Which colour", "What colour"))
    result = srcfast("label", "read", file, "--pairs", pairs, "--output", tmp_path / "v.jsonl")
    assert result.exit_code == 2 and "the hash of this pair" in result.output and not (tmp_path / "v.jsonl").exists()


def test_a_run_without_two_candidates_that_differ_is_refused(tmp_path: Path, srcfast: Srcfast) -> None:
    run = write_judged_run(tmp_path, 2, texts=["It is.", "It is."])
    result = srcfast("label", "write", run, "--output", tmp_path / "page.html")
    assert result.exit_code == 2 and "two candidates that differ" in result.output
    for option, value in (("--pairs", "0"), ("--pairs", "10001"), ("--seed", "-1")):
        result = srcfast("label", "write", run, "--output", tmp_path / "page.html", option, value)
        assert result.exit_code == 2 and option in result.output


STAND_IN = """
const made = [], pressed = {};
const field = { value: "", trim: "", focus() {}, addEventListener(_, f) { this.typed = f; } };
const element = (dataset) => ({ dataset, hidden: false, setAttribute() {}, addEventListener() {}, querySelectorAll: () => [] });
const all = ["k1", "k2", "k3"].map((pair) => element({ pair }));
const saveButton = { addEventListener(_, f) { this.click = f; } };
const byId = { name: field, save: saveButton, progress: {} };
const stored = {};
globalThis.localStorage = { getItem: (key) => stored[key] ?? null, setItem: (key, value) => { stored[key] = value; } };
globalThis.document = {
  body: { dataset: { page: "p" } },
  querySelectorAll: (name) => (name === "article" ? all : []),
  getElementById: (id) => byId[id],
  addEventListener(_, f) { this.key = f; },
  createElement: () => ({ click() { made.push(this); } }),
};
globalThis.Blob = class { constructor(parts) { this.text = parts.join(""); } };
globalThis.URL = { createObjectURL: (blob) => blob };
"""
USE = """
const press = (key) => document.key({ key, target: null });
press("1"); press("ArrowRight"); press("2"); press("ArrowLeft"); press("x"); press("0");
saveButton.click();
field.value = " Anna "; field.typed(); saveButton.click();
console.log(JSON.stringify({ text: made.map((link) => link.href.text), names: made.map((link) => link.download),
  shown: all.map((a) => !a.hidden), progress: byId.progress.textContent, stored: JSON.parse(stored["srcfast-labels-p"]) }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs a JavaScript engine")
def test_the_page_s_script_takes_keys_and_saves_lines(tmp_path: Path) -> None:
    script = (Path(__file__).parents[3] / "srcfast/report/templates/label.js").read_text(encoding="utf-8")
    (tmp_path / "page.js").write_text(STAND_IN + script + USE, encoding="utf-8")
    result = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True, timeout=300, check=True)
    saved = json.loads(result.stdout)
    # 1 judges the first pair and goes on; the second is passed over; 2 judges the third, where it stays; back to the second.
    verdicts = {"k1": "first", "k3": "second", "k2": "tie"}
    assert saved["stored"] == {"name": " Anna ", "verdicts": verdicts}
    assert saved["names"] == ["labels.jsonl"]  # none without a name
    rows = [json.loads(line) for line in saved["text"][0].splitlines()]
    assert rows == [{"pair": key, "verdict": verdicts[key], "by": "Anna"} for key in ("k1", "k2", "k3")]
    assert saved["progress"] == "pair 3 of 3, 3 judged" and saved["shown"] == [False, False, True]
