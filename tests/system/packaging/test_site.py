"""The documentation as a site: every page is in its navigation, all links lead somewhere, and no page asks another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).parents[3]
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def pages_of(nav: Any) -> list[str]:
    """The files that a navigation names, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(part)]


def test_the_navigation_names_every_page_once() -> None:
    assert sorted(pages_of(SETTINGS["nav"])) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_no_font_is_asked_of_another_host() -> None:
    assert SETTINGS["theme"]["font"] is False


def test_ci_installs_what_builds_the_site() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [extras] = re.findall(r'--editable "\.\[([\w,]+)\]"', makefile)
    assert "docs" in extras.split(",")
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a page of HTML links to, what it loads, and the names of its parts."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.names: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.names |= {values["id"]} if "id" in values else set()
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("next", "prev", "canonical"):
            self.loads.append(values["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in values:
            self.loads.append(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    output = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(output)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return output


def test_every_link_of_the_site_leads_to_a_page_and_a_heading(site: Path) -> None:
    pages = {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}  # whose links begin at /
    assert {f"{Path(name).stem}.html" for name in pages_of(SETTINGS["nav"])} - {"README.html"} <= {
        file.name for file in site.glob("*.html")
    }
    broken, followed = [], 0
    for file, page in pages.items():
        for link in page.links + page.loads:
            if link.startswith(("https:", "mailto:", "data:", "javascript:")):
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (file.parent / name).resolve() if name else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].names):
                broken.append((str(file.relative_to(site)), link))
            followed += 1
    assert broken == [] and followed > 1000


def test_a_page_loads_nothing_from_another_host(site: Path) -> None:
    for file in site.rglob("*.html"):
        assert [name for name in Page(file).loads if re.match(r"(https?:)?//", name)] == [], file
    for file in site.rglob("*.css"):
        assert re.findall(r"url\(\s*['\"]?(?:https?:)?//", file.read_text(encoding="utf-8")) == [], file


def test_files_of_the_repository_are_pages_and_pictures_are_there(site: Path) -> None:
    code = (site / "repository" / "srcfast" / "generation" / "kv_cache.py.html").read_text(encoding="utf-8")
    assert "SlotCache" in code
    readme = site / "repository" / "index.html"
    pictures = [name for name in Page(readme).loads if name.endswith(("page.png", "stages.svg"))]
    assert len(pictures) == 2
    for name in pictures:
        source = ROOT / "docs" / "images" / Path(name).name
        assert (readme.parent / name).read_bytes() == source.read_bytes()


def test_a_link_to_nothing_ends_the_build(tmp_path: Path) -> None:
    pytest.importorskip("material")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("# A page\n\n[missing](nowhere.md)\n", encoding="utf-8")
    settings = SETTINGS | {"nav": ["README.md"], "hooks": [str(ROOT / SETTINGS["hooks"][0])]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "nowhere.md" in done.stderr
