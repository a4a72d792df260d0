"""A foreign run directory's gallery may name any file: the page shows images of the run's directory, and what the user allows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from helpers.made_up_run import make_run
from PIL import Image

from srcfast.report import plots
from srcfast.report.page import write_report

Srcfast = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    return make_run(tmp_path / "runs" / "foreign", gallery=1)


@pytest.fixture
def private(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "home" / "private.png")
    return tmp_path / "home" / "private.png"


def name_images(run: Path, **names: Any) -> None:
    entry = json.loads((run / "gallery.json").read_text())[0]
    (run / "gallery.json").write_text(json.dumps([entry | names]))


def shown(run: Path, *roots: Path) -> bool:
    html = write_report(run, roots).read_text(encoding="utf-8")
    assert html.count("<img") + html.count("image not available") == 1
    return "<img" in html


@pytest.mark.parametrize("field", ["image", "image_from_run"])
@pytest.mark.parametrize(
    "way", ["absolute", "relative", "through the run", "link", "linked folder", "hidden in a name"]
)
def test_no_image_from_elsewhere_is_embedded(run: Path, private: Path, field: str, way: str) -> None:
    (run / "images" / "link.png").symlink_to(private)
    (run / "images" / "linked").symlink_to(private.parent)
    names = {
        "absolute": str(private),
        "relative": os.path.relpath(private, run),
        "through the run": f"images/../../../{private.parent.name}/private.png",
        "link": "images/link.png",
        "linked folder": "images/linked/private.png",
        "hidden in a name": f"{run}/../../home/private.png",
    }
    name_images(run, **{"image": "none.png", field: names[way]})
    assert not shown(run)
    assert not shown(run, run.parent)
    assert shown(run, run.parent, private.parent), "its directory was allowed"


def test_no_further_image_from_elsewhere_is_embedded(run: Path, private: Path) -> None:
    name_images(
        run,
        image=str(private),
        further_images=[{"image": str(private)}, {"image": "x", "image_from_run": str(private)}],
    )
    html = write_report(run).read_text(encoding="utf-8")
    assert "<img" not in html and html.count("image not available") == 3
    assert write_report(run, [private.parent]).read_text(encoding="utf-8").count("<img") == 3


def test_what_the_run_s_settings_name_is_foreign_as_well(run: Path, private: Path) -> None:
    text = f"output: {private.parent}\ndata: {{train: [{{name: a, path: {private}, image_root: {private.parent}}}]}}\n"
    (run / "config.yaml").write_text(text)
    name_images(run, image=str(private))
    assert not shown(run)


@pytest.mark.parametrize("name", ["/dev/zero", "/etc/passwd", "a\0b", "x" * 300, "pipe", "images", ".", ""])
def test_what_is_no_image_leaves_a_note_and_ends(run: Path, name: str) -> None:
    os.mkfifo(run / "pipe")
    name_images(run, image=name or "gone.png", image_from_run=name)
    assert not shown(run, Path("/"))


def test_images_of_the_run_s_directory_are_shown_where_it_lies_behind_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(run)
    assert shown(run) and shown(tmp_path / "linked")


def test_the_command_shows_what_the_option_allows_and_names_it(srcfast: Srcfast, run: Path, private: Path) -> None:
    name_images(run, image=str(private))
    done = srcfast("report", run)
    assert done.exit_code == 0, done.output
    assert f"outside of {run}: 1. Fix: --image-root DIR" in done.output
    assert "<img" not in (run / "report" / "index.html").read_text(encoding="utf-8")
    done = srcfast("report", run, "--image-root", run.parent / "none", "--image-root", private.parent)
    assert done.exit_code == 0 and "Fix" not in done.output
    assert "<img" in (run / "report" / "index.html").read_text(encoding="utf-8")
