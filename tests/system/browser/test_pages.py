"""Each page as a person sees it, in a real browser: on a phone and on a desk, by day and by night. Skipped without a Chromium.

`SRCFAST_SCREENSHOTS=DIRECTORY` writes a picture of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import SCHEMES, SIZES, browser, look_at
from helpers.made_up_run import make_run

from srcfast.report.gallery import embedded_image
from srcfast.report.label_page import write_label_page
from srcfast.report.live_page import render_live
from srcfast.report.page import templates, write_report
from srcfast.stages.judged_pairs import RunPair
from srcfast.study.page import Example
from srcfast.world.samples import world_samples

ROOT = Path(__file__).parents[3]


def write_run_page(folder: Path) -> Path:
    """The page of a run with everything that a page can have."""
    pytest.importorskip("matplotlib")
    return write_report(make_run(folder / "a-run-with-quite-a-long-name", gallery=3))


def write_study_page(folder: Path) -> Path:
    """The page of a study of many columns, with an example."""
    [sample] = world_samples("test", 1, 0, image_dir=folder)
    picture = embedded_image(folder / sample.images[0], folder)
    assert picture is not None
    rows = [["arm", *(f"set-{number}" for number in range(12))]]
    rows += [[f"src_independent_{number}", *["52.0 (50.4 to 53.6)"] * 12] for number in range(6)]
    text = "<see> There is a small red circle. </see> <think> So there is one. </think> <answer> 1 </answer>"
    example = Example("world", sample.question, sample.answer, [picture], [("src", text, True), ("dpo", text, False)])
    html = (
        templates()
        .get_template("study.html")
        .render(
            name="a study",
            subtitle=["6 arms", "5 seeds"],
            tables=[("Arms", "Percent, with intervals.", rows)],
            compared=("src", "dpo"),
            examples=[example],
        )
    )
    file = folder / "study.html"
    file.write_text(html, encoding="utf-8")
    return file


def write_live_page(folder: Path) -> Path:
    """The live page of a run in the middle, with the bar of a stage."""
    pytest.importorskip("matplotlib")
    run = make_run(folder / "a-run-with-quite-a-long-name", gallery=3)
    stage = run / "checkpoint" / "iteration-2" / "dpo"
    stage.mkdir(parents=True)
    counters = {"stage": "iteration-2/dpo", "done": 30, "total": 90, "unit": "steps", "tokens": 9000, "seconds": 12.0}
    (stage / "progress.json").write_text(json.dumps(counters | {"written": time.time()}))
    file = folder / "live.html"
    file.write_text(render_live(run), encoding="utf-8")
    return file


def write_page_to_label(folder: Path) -> Path:
    """A page of two pairs, one with a long word."""
    samples = world_samples("test", 2, 0, image_dir=folder)
    tagged = "<see> There is a small red circle. </see> <think> So there is one. </think> <answer> 1 </answer>"
    pairs = [RunPair(sample, tagged, f"Untagged {'w' * 200}.", "random", None) for sample in samples]
    file = folder / "label.html"
    write_label_page(file, pairs, "a run")
    return file


PAGES = {"run": write_run_page, "study": write_study_page, "live": write_live_page, "label": write_page_to_label}


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    with browser() as one:
        yield one


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, opened: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PAGES[request.param](tmp_path_factory.mktemp(request.param))


def screenshot(name: str) -> Path | None:
    directory = os.environ.get("SRCFAST_SCREENSHOTS")
    return None if directory is None else Path(directory) / f"{name}.png"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
def test_a_page_is_whole_readable_and_asks_for_nothing(page: Path, opened: Any, size: str, scheme: str) -> None:
    look = look_at(opened, page, size, scheme, screenshot(f"{page.stem}-{size}-{scheme}"))
    assert look.messages == []
    assert look.requests == []  # no font, script or picture beside the file
    assert look.overflow <= 0, "the page scrolls sideways"
    assert look.broken == [] and (look.pictures > 0 or page.stem == "live")  # which shows text and curves
    assert look.faint == [] and look.texts > 15


@pytest.fixture(scope="module")
def site(opened: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material")
    output = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(output)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600, env=environment)
    return output


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["index.html", "results.html", "repository/index.html", "repository/LICENSE.html"])
def test_the_documentation_is_whole_and_asks_no_other_host(site: Path, opened: Any, name: str, size: str) -> None:
    look = look_at(opened, site / name, size, "light", screenshot(f"site-{name.replace('/', '-')}-{size}"))
    assert look.messages == []
    assert [url for url in look.requests if not url.startswith(site.resolve().as_uri())] == []
    assert look.overflow <= 0 and look.broken == []


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ('<p style="color: #999">faint</p>', "faint"),
        ('<div style="width: 3000px">wide</div>', "overflow"),
        ('<img src="missing.png" alt="">', "broken"),
        ('<img src="https://example.invalid/a.png" alt="">', "requests"),
        ("<script>throw new Error('late')</script>", "messages"),
    ],
)
def test_what_is_wrong_with_a_page_is_seen(body: str, what: str, opened: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><meta charset=utf-8><body>{body}</body>", encoding="utf-8")
    assert getattr(look_at(opened, file, "phone", "light"), what)
    file.write_text("<!doctype html><meta charset=utf-8><body><p>plain</p></body>", encoding="utf-8")
    look = look_at(opened, file, "phone", "light")
    assert (look.messages, look.requests, look.overflow, look.broken, look.faint) == ([], [], 0, [], [])
