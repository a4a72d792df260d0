"""The page: self-contained, escaped, complete where a run is, and honest where something is missing."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pytest
from helpers.made_up_run import MODELS, make_run
from PIL import Image
from rich.console import Console

from srcfast.cli.table import results_table
from srcfast.data.records import Sample
from srcfast.errors import InputError
from srcfast.report import plots
from srcfast.report.gallery import image_names
from srcfast.report.page import render, templates, write_report
from srcfast.report.run_files import RunFiles, read_run

SECTIONS = (
    "results",
    "the-four-cases",
    "abilities",
    "headroom",
    "training",
    "scores-and-confidences",
    "from-candidates-to-pairs",
    "time",
    "gallery",
)


class Elements(HTMLParser):
    """Tags with their attributes, and whether every element was closed in order."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def ids(self) -> list[str]:
        return [held for _, attributes in self.found if (held := attributes.get("id"))]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path_factory.mktemp("runs") / "made-up", seed=3, gallery=3)
    written = write_report(run)
    assert written == run / "report" / "index.html"
    return written.read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    elements = Elements(page)
    assert elements.open == []
    for tag, attributes in elements.found:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), "no scripts in attributes"
    assert "http" not in page and "url(" not in page.replace("url(#", "")


def test_every_part_and_picture_is_there(page: str) -> None:
    elements = Elements(page)
    assert set(SECTIONS) <= set(elements.ids)
    assert len(elements.ids) == len(set(elements.ids)), "ids of different pictures must not collide"
    pictures = [attributes["aria-label"] for tag, attributes in elements.found if tag == "svg"]
    assert len(pictures) == 6 and "headroom" in pictures
    for link in re.findall(r'href="#([^"]+)"', page):
        assert link in elements.ids, "every inner link leads somewhere"
    text = " ".join(elements.text)
    for model in MODELS:
        assert model in text
    assert "Chosen rewards may fall" in text


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what has nothing to do with the pictures, which take most of the time."""
    monkeypatch.setattr(plots, "can_plot", lambda: False)


@pytest.mark.usefixtures("no_plots")
def test_the_headline_shows_the_summary_and_its_intervals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", seed=11, gallery=1)
    row = json.loads((run / "summary.json").read_text())["evaluations"][-1]
    html = write_report(run).read_text(encoding="utf-8")
    low, high = (100 * bound for bound in row["alignment_ci95"])
    assert f"{100 * row['alignment']:.1f} <small>[{low:.1f}, {high:.1f}]</small>" in html
    assert f"{100 * row['accuracy']:.1f} <small>[" in html


def test_a_calibration_s_errors_are_shown_in_percent(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", gallery=1)
    summary = json.loads((run / "summary.json").read_text())
    summary["calibration"] = {"iteration-2": {"ece_before": 0.1234, "ece_after": 0.0215}}
    (run / "summary.json").write_text(json.dumps(summary))
    text = " ".join(" ".join(Elements(write_report(run).read_text(encoding="utf-8")).text).split())
    assert "verdicts before the R-Scorer was calibrated – % 12.3 %" in text and "verdicts since – % 2.1 %" in text


def test_text_from_files_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)">&\'"$\\frac{ {{ 7 * 6 }}{% raw %}'
    run = make_run(tmp_path / "run", gallery=1)
    summary = json.loads((run / "summary.json").read_text())
    for row in summary["evaluations"]:
        row["dataset"] = row["split"] = evil
        row["by_ability"] = {
            evil: {"n": 1, "accuracy": 1.0, "alignment": None},
            "b": {"n": 1, "accuracy": 0.0},
        }
    for row in summary["headroom"]:
        row["dataset"] = row["split"] = evil
    summary["funnel"] = {evil: summary["funnel"]["iteration-1"] | {"dropped": {evil: 3}}}
    for stage in summary["stages"]:
        stage["name"] = evil
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "metrics.jsonl").write_text(
        json.dumps({"stage": f"{evil}/dpo", "step": 0, "loss": 0.69, "margin": 0.0}) + "\n"
    )
    gallery = json.loads((run / "gallery.json").read_text())
    for key in ("question", "gold", "sample_id"):
        gallery[0][key] = evil
    for candidate, text in zip(
        gallery[0]["candidates"], (evil, f"{evil} Answer: {evil}", f"Answer: {evil}"), strict=False
    ):
        candidate |= {"text": text, "case": evil, "claims": [[evil, evil, evil]]}
    (run / "gallery.json").write_text(json.dumps(gallery))
    (run / "config.yaml").write_text(json.dumps({"name": evil, "model": {"path": evil}, "seed": evil}))
    (run / "environment.json").write_text(json.dumps({"cpu": evil, evil: evil}))
    elements = Elements(write_report(run).read_text(encoding="utf-8"))
    assert elements.open == []
    assert not any("onerror" in attributes for _, attributes in elements.found)
    assert sum(evil in text for text in elements.text) > 20


REPORT = Path(plots.__file__).parent
TEMPLATES = sorted((REPORT / "templates").iterdir())
# `safe` and `autoescape` leave values unescaped; outside quotes a value that is escaped can still add an attribute.
UNESCAPED = re.compile(r"\bsafe\b|\bautoescape\b|=\s*{{")


def test_the_templates_escape_every_value_and_miss_none() -> None:
    environment = templates()
    assert environment.autoescape is True
    for name in environment.list_templates():
        assert environment.get_template(name).environment is environment
    shown = environment.from_string('<a title="{{ value }}">{{ value }}</a>').render(value="<b>\"'&")
    assert shown == '<a title="&lt;b&gt;&#34;&#39;&amp;">&lt;b&gt;&#34;&#39;&amp;</a>'
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ missing }}").render()


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.name)
def test_no_template_leaves_a_value_unescaped(file: Path) -> None:
    assert UNESCAPED.findall(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "{{ value|safe }}",
        "{{ value | safe }}",
        "{{ values|map('safe')|join }}",
        "{% filter safe %}{{ value }}{% endfilter %}",
        "{% autoescape false %}{{ value }}{% endautoescape %}",
        "<img alt={{ value }}>",
    ],
)
def test_a_value_left_unescaped_would_be_seen(source: str) -> None:
    assert UNESCAPED.search(source)


def test_pictures_alone_are_markup_that_python_makes() -> None:
    sources = {file.name: file.read_text(encoding="utf-8") for file in REPORT.glob("*.py")}
    assert {name: text.count("Markup(") for name, text in sources.items() if "Markup" in text} == {"plots.py": 1}
    assert not [name for name, text in sources.items() if "__html__" in text]


def test_importing_the_page_loads_neither_torch_nor_templates() -> None:
    heavy = {"torch", "transformers", "matplotlib", "jinja2"}
    code = f"import sys, srcfast.report.page; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("set()", 0), done.stderr


def test_without_matplotlib_the_page_says_so_and_keeps_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it now raises ImportError
    assert not plots.can_plot()
    html = write_report(make_run(tmp_path / "run", gallery=1)).read_text(encoding="utf-8")
    assert "<svg" not in html and "matplotlib is not installed" in html
    assert "right answer, wrong rationale" in html, "the four cases are a table then"


def test_a_run_that_was_only_evaluated_gives_a_page(tmp_path: Path) -> None:
    row = {
        "model": "base",
        "dataset": "mine",
        "split": "test",
        "n": 7,
        "accuracy": 3 / 7,
        "accuracy_ci95": [0.0, 0.9],
    }
    row |= {
        "rationale_accuracy": None,
        "right_answer_wrong_rationale": None,
        "alignment": None,
        "unparsed": 1,
        "by_ability": {},
    }
    (tmp_path / "summary.json").write_text(json.dumps({"evaluations": [row], "seconds": 4.0}))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "42.9" in html and html.count("Not measured in this run.") >= 5
    assert Elements(html).open == []


def test_rules_and_their_figures_are_named_on_the_page_and_in_the_table(tmp_path: Path) -> None:
    row: dict[str, Any] = {"model": "base", "dataset": "mmstar", "split": "test", "n": 7, "accuracy": 3 / 7}
    row |= {"accuracy_ci95": [0.0, 0.9], "alignment": None, "right_answer_wrong_rationale": None, "unparsed": 1}
    others = row | {"dataset": "pope", "rule": "yes_no", "scores": {"f1": 0.654, "recall": 0.5}}
    values = {
        f"v{number:02}": {"n": 3, "accuracy": 0.5, "accuracy_ci95": [0.2, 0.75], "scores": {}} for number in range(23)
    }
    values["v00"] = {"n": 4, "accuracy": 0.123, "scores": {"chance": 0.25, "circular": 0.111}}
    rows = [
        row | {"rule": "choice", "scores": {"chance": 0.25}, "by_category": {"l2_category": values}},
        others,
        row | {"dataset": "own", "rule": "exact", "scores": {}},
    ]
    (tmp_path / "summary.json").write_text(json.dumps({"evaluations": rows, "seconds": 4.0}))
    html = " ".join(write_report(tmp_path).read_text(encoding="utf-8").split())
    assert "the right option&#39;s letter or text; chance: a guess among the options. base: chance 25.0 %." in html
    assert "<h3>mmstar, test, by l2_category</h3>" in html and html.count("50.0 <small>[20.0, 75.0]</small>") == 22
    assert '<td class="text">v00</td> <td>4</td> <td>25.0</td> <td>12.3</td> <td>11.1</td>' in html
    assert "pope, test: yes or no" in html and "base: f1 65.4 %; recall 50.0 %." in html
    assert "own, test: " not in html
    console = Console(width=200)
    with console.capture() as captured:
        console.print(results_table({"evaluations": rows}))
    shown = captured.get()
    assert "chance 25.0" in shown and "f1 65.4, recall 50.0" in shown and shown.count("multiple choice") == 1
    assert "equal to the gold" not in shown
    assert "v00 (4); chance 25.0, circular 11.1" in shown and "v19 (3)" in shown and "50.0 ± 27.5" in shown
    assert "v20" not in shown and "and 3 more in summary.json" in shown


@pytest.mark.usefixtures("no_plots")
def test_a_picture_that_is_gone_or_broken_leaves_a_note(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", gallery=3)
    gallery = json.loads((run / "gallery.json").read_text())
    for entry in gallery:
        entry["image"] = f"images/{entry['sample_id']}.png"
    (run / "images" / f"{gallery[1]['sample_id']}.png").write_bytes(b"not a picture")
    Image.new("RGB", (900, 450), "teal").save(run / "images" / f"{gallery[2]['sample_id']}.png")
    (run / "gallery.json").write_text(json.dumps(gallery))
    html = write_report(run).read_text(encoding="utf-8")
    assert html.count("image not available") == 2
    assert html.count('src="data:image/jpeg;base64,') == 1, "a photograph is scaled down and embedded"


@pytest.mark.usefixtures("no_plots")
def test_a_metrics_line_cut_short_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", gallery=1)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"stage": "rationale", "st')
    write_report(run)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line \d+: expected a JSON object"):
        write_report(run)


@pytest.mark.usefixtures("no_plots")
def test_a_directory_without_a_summary_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"summary\.json: expected the summary of a run"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(InputError, match=r"summary\.json: expected what a run writes .* found \[1\]"):
        write_report(tmp_path)


def test_the_same_run_gives_the_same_picture(page: str, tmp_path: Path) -> None:
    with plots.page_style():
        again = plots.headroom_plot(read_run(make_run(tmp_path / "made-up", seed=3, gallery=1)))
    assert again and again in page


@pytest.mark.usefixtures("no_plots")
def test_a_stage_that_was_stopped_and_begun_anew_is_shown_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", gallery=1)
    file = run / "metrics.jsonl"
    rows = [{"stage": "rationale", "step": step, "loss": 9.0} for step in range(7)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + file.read_text())
    assert [row["step"] for row in read_run(run).training("rationale")] == list(range(150))
    assert "<td>150</td>" in write_report(run).read_text(encoding="utf-8")


def test_a_training_that_begins_again_at_its_last_step_has_the_later_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", gallery=1)
    rows = [{"stage": "short", "step": step, "loss": loss} for step, loss in ((0, 9.0), (0, 8.0), (1, 7.0))]
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["loss"] for row in read_run(run).training("short")] == [8.0, 7.0]


@pytest.mark.usefixtures("no_plots")
def test_a_sample_without_an_image_has_its_card(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", gallery=1)
    entries = json.loads((run / "gallery.json").read_text())
    entries[0]["image"] = None
    (run / "gallery.json").write_text(json.dumps(entries))
    html = write_report(run).read_text(encoding="utf-8")
    assert "<img" not in html and "not available" not in html and html.count('<article class="card">') == 1


@pytest.mark.parametrize("together", [("runs",), ("runs", "data")])
def test_the_gallery_finds_its_images_in_a_moved_run_whether_or_not_they_were_moved_too(
    tmp_path: Path, together: tuple[str, ...]
) -> None:
    entries = []
    for place in ("data", "runs/images"):
        folder = tmp_path / "old" / place
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4), (9, 9, 9)).save(folder / "a.png")
        sample = Sample("s", ("a.png",), "What?", "red", image_root=folder)
        names = image_names(sample, tmp_path / "old" / "runs" / "one", tmp_path / "old" / "runs")
        entries.append({**names, "sample_id": "s", "question": "What?", "gold": "red", "candidates": []})
    (tmp_path / "old" / "runs" / "one").mkdir()
    (tmp_path / "new").mkdir()
    for place in together:
        (tmp_path / "old" / place).rename(tmp_path / "new" / place)
    run = RunFiles(tmp_path / "new" / "runs" / "one", {}, [], entries, {}, {})
    assert render(run).count("<img") == 2


def test_the_gallery_shows_a_sample_s_images_in_order_and_four_at_most(tmp_path: Path) -> None:
    names = tuple(f"{number}.png" for number in range(6))
    for number, name in enumerate(names):
        if number != 1:  # one that is gone
            Image.new("RGB", (4, 4), (40 * number, 9, 9)).save(tmp_path / name)
    run = tmp_path / "run"
    run.mkdir()
    counts = []
    for shown in (names[:1], names[:3], names):
        fields = image_names(Sample("s", shown, "What?", "red", image_root=tmp_path), run, tmp_path)
        assert ("further_images" in fields) == (len(shown) > 1) and fields["image"] == "../0.png"
        entry = {**fields, "sample_id": "s", "question": "What?", "gold": "red", "candidates": []}
        html = render(RunFiles(run, {}, [], [entry], {}, {}))
        counts.append((html.count("<img"), html.count("not available")))
    assert counts == [(1, 0), (2, 1), (3, 1)]
    uris = re.findall(r'<img[^>]*src="data:image/png;base64,([^"]+)"', html)
    reds = [Image.open(io.BytesIO(base64.b64decode(uri))).getpixel((0, 0))[0] for uri in uris]
    assert reds == [0, 80, 120]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("metrics", [5, [1], {"x": 1}, {"rows": "many"}])
def test_a_foreign_manifest_s_metrics_are_named(tmp_path: Path, metrics: object) -> None:
    run = make_run(tmp_path / "run", gallery=1)
    (run / "manifest.json").write_text(json.dumps({"rationale": {"metrics": metrics}}))
    with pytest.warns(RuntimeWarning, match=r"metrics\.jsonl: expected the .* rows that stage 'rationale' wrote"):
        write_report(run)
