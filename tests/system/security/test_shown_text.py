"""Text of models and data is shown, never obeyed: not by a browser that opens the page, not by a terminal."""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console

from srcfast.cli import model_tools
from srcfast.cli.table import results_table, table
from srcfast.errors import printable
from srcfast.report.page import write_report
from srcfast.run.progress import StageProgress, track

Srcfast = Callable[..., Result]
HTML = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title></text></svg><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<a href=javascript:alert(1)>x</a>",
    "[x](javascript:alert(1))",
    "<svg onload=alert(1)>",
    "<!--",
    "]]><script>alert(1)</script>",
    "&lt;script&gt;",
    "\x00\x1b[31m\u202e<b>",
)
# Colours, a link, a title set, the clipboard filled, the screen cleared, a line overwritten, 8-bit CSI, writing turned round.
TERMINAL = (
    "\x1b[31mred\x1b[0m",
    "\x1b]8;;http://evil.example\x1b\\x\x1b]8;;\x1b\\",
    "\x1b]0;title\x07",
    "\x1b]52;c;ZWNobw==\x07",
    "\x1b[2J\x1b[H",
    "sound\rEVIL",
    "sound\b\b\b\b\bEVIL",
    "\x9b31m",
    "\u202etxet\u2066",
    "\x7f\x0b\x0c\x00",
)
MARKUP = ("[red]a[/red]", "[link=http://evil.example]a[/link]", "[/]", "[bold", "[@click=app.quit]a[/]", ":smile:")
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Page(HTMLParser):
    """Elements, attributes and text as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.tags.append("comment")


def evil_run(path: Path, evil: str) -> Path:
    """A run's files with this text wherever a text may stand."""
    score = {"text": evil, "score": 0.5, "answer": evil, "case": evil, "claims": [[evil, evil, evil]]}
    answered = score | {"text": f"It is {evil}. Answer: {evil}"}
    card = {"image": f"{evil}.png", "question": evil, "gold": evil, "sample_id": evil, "iteration": evil}
    row = {
        "model": "base",
        "dataset": evil,
        "split": evil,
        "n": 4,
        "accuracy": 0.5,
        "accuracy_ci95": [0.2, 0.8],
        "alignment": 0.25,
        "rationale_accuracy": 0.5,
        "right_answer_wrong_rationale": 0.25,
        "unparsed": 0,
        "by_ability": {evil: {"n": 2, "accuracy": 0.5, "alignment": None}, "b": {"n": 2, "accuracy": 1.0}},
        "by_category": {evil: {evil: {"n": 2, "accuracy": 0.5, "scores": {evil: 0.5}}}},
        "cases": {
            "both_right": 1,
            "right_answer_wrong_rationale": 1,
            "right_rationale_wrong_answer": 1,
            "both_wrong": 1,
        },
    }
    headroom = {"iteration": evil, "dataset": evil, "split": evil, "n": 4, "pass_at_1": 0.2, "pass_at_n": 0.6}
    summary = {
        "evaluations": [row, row | {"model": evil}],
        "funnel": {evil: {"samples": 4, "kept": 2, "dropped": {evil: 2}, "pair_correctness": {evil: 1.0}}},
        "headroom": [headroom | {"best_of_n": 0.4, "n_candidates": 4.0}],
        "stages": [{"name": evil, "seconds": 1.0}],
        "seconds": 2.0,
    }
    steps = [{"stage": f"{evil}/dpo", "step": step, "loss": 0.6, "margin": 0.1} for step in range(3)]
    files = {
        "summary.json": summary,
        "gallery.json": [card | {"candidates": [score, answered], "chosen": 0, "rejected": 1, "confidence": 0.5}],
        "environment.json": {"cpu": evil, evil: evil},
        "config.yaml": {"name": evil, "model": {"path": evil}, "seed": evil, evil: {evil: [evil]}},
    }
    for name, value in files.items():
        (path / name).write_text(json.dumps(value), encoding="utf-8")
    (path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Page:
    pytest.importorskip("matplotlib")
    return Page(write_report(evil_run(tmp_path_factory.mktemp("run"), "harmless")).read_text(encoding="utf-8"))


@pytest.mark.parametrize("evil", HTML)
def test_text_adds_no_element_and_no_attribute_to_the_page(tmp_path: Path, harmless: Page, evil: str) -> None:
    """Pictures included: their letters are text in SVG."""
    page = Page(write_report(evil_run(tmp_path, evil)).read_text(encoding="utf-8"))
    assert set(page.tags) <= set(harmless.tags), "the elements of a page with harmless text"
    assert not {"script", "comment", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert {name for name, _ in page.attributes} <= {name for name, _ in harmless.attributes}
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href", "action")]
    assert all(value.startswith(("#", "data:image/")) for value in links)
    assert page.tags.count("h3") == harmless.tags.count("h3") and page.tags.count("td") == harmless.tags.count("td")


# The terminal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evil", TERMINAL)
def test_what_a_terminal_would_obey_is_spelled_out(evil: str) -> None:
    assert not OBEYED.search(printable(evil)) and printable(printable(evil)) == printable(evil)


def test_other_text_is_printed_as_it_is() -> None:
    for text in ("a\tb\nc", "\u00e9\u4e2d\U0001f600", "[red]x[/red]", r"C:\x1b", "\u05d0\u0628"):
        assert printable(text) == text
    assert printable("\udcff") == "\\udcff", "a file's name that is no UTF-8 can be printed"


def shown(print_it: Callable[[Console], Any]) -> str:
    """What a colour terminal would be sent."""
    stream = io.StringIO()
    print_it(Console(file=stream, force_terminal=True, width=400, color_system="truecolor"))
    return stream.getvalue()


STYLES = re.compile(r"\x1b\[[0-9;]*m")  # rich's own


@pytest.mark.parametrize("evil", (*TERMINAL, *MARKUP))
def test_the_results_table_shows_names_as_they_are(evil: str) -> None:
    entry = {"dataset": evil, "split": "test", "model": evil, "n": 4, "accuracy": 0.5, "accuracy_ci95": [0.2, 0.8]}
    entry |= {"alignment": None, "right_answer_wrong_rationale": None, "unparsed": 0}
    entry["by_category"] = {evil: {evil: {"n": 1, "accuracy": 1.0, "scores": {evil: 0.5}}}}
    text = STYLES.sub("", shown(lambda console: console.print(results_table({"evaluations": [entry]}))))
    assert text.count(printable(evil)) == 4 and not OBEYED.search(text)


@pytest.mark.parametrize("evil", (*TERMINAL, *MARKUP))
def test_progress_shows_names_as_they_are(
    evil: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with track(evil, 3) as progress:
        progress.advance(3)
    lines = capsys.readouterr().err
    assert printable(evil) in lines and not OBEYED.search(lines)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "300")
    bar = StageProgress(evil, 3)
    bar.close()
    sent = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", terminal.getvalue())  # rich's own colours and movements
    assert printable(evil) in sent and not OBEYED.search(sent)


@pytest.mark.parametrize("evil", (*TERMINAL, *MARKUP))
def test_other_tables_show_cells_as_they_are(evil: str, capsys: pytest.CaptureFixture[str]) -> None:
    table("title", [("name", evil)])
    text = capsys.readouterr().out
    assert not OBEYED.search(text) and (printable(evil) in text or "\n" in printable(evil))


@pytest.mark.parametrize("evil", TERMINAL)
def test_errors_show_data_as_it_is(srcfast: Srcfast, tmp_path: Path, evil: str) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"id": evil, "question": evil, "answer": "a", "image": f"{evil}.png", evil: 1}
    file.write_text(f"{json.dumps(row)}\nno JSON {evil}\n", encoding="utf-8")
    for words in (("convert", file, tmp_path / "out.json"), ("estimate", f"{evil}=1"), ("estimate", f"name={evil}")):
        result = srcfast(*words)
        assert result.exit_code in (1, 2) and not OBEYED.search(result.output), (words, result.output)


@pytest.mark.parametrize("evil", (*TERMINAL, *MARKUP))
def test_inspect_shows_records_as_they_are(
    srcfast: Srcfast, sound_model: Path, images: Path, tmp_path: Path, evil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    (images / "b.png").write_bytes((images / "a.png").read_bytes())
    file = tmp_path / "samples.jsonl"
    row = {"id": evil, "image": "b.png", "question": f"what {evil}", "answer": evil, "facts": [f"It is {evil}."]}
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    result = srcfast("inspect", "--model", sound_model, "--data", file, "--image-root", images, f"output={tmp_path}")
    assert result.exit_code == 0, (result.output, result.exception)
    text = STYLES.sub("", result.output)
    assert not OBEYED.search(text), text
    assert f"sample {printable(evil)}" in text


@pytest.mark.parametrize("evil", TERMINAL)
def test_warnings_quote_damaged_files_as_they_are(srcfast: Srcfast, evil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*arguments: Any) -> None:
        warnings.warn(f"a damaged checkpoint (found {evil})", RuntimeWarning, stacklevel=1)

    monkeypatch.setattr(model_tools, "doctor", warn)
    monkeypatch.setattr(warnings, "showwarning", lambda *told: sys.stderr.write(warnings.formatwarning(*told[:4])))
    result = srcfast("doctor")
    assert f"(found {printable(evil)})" in result.output and not OBEYED.search(result.output)
