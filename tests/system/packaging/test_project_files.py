"""The files that a visitor reads first agree with setup.py."""

import hashlib
import re
from pathlib import Path

import pytest
import yaml
from test_house_rules import FLOORS

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/**/*.md")])
# SHA-256 of https://www.apache.org/licenses/LICENSE-2.0.txt
APACHE_2_0 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def setup_field(name: str) -> str:
    """A field that setup.py gives as plain text."""
    [value] = re.findall(rf'^    {name}="([^"]*)",$', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    return value


def test_the_license_is_the_one_that_setup_names():
    assert setup_field("license") == "Apache-2.0"
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0


def test_the_citation_agrees_with_setup():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    fields = {"title": "name", "version": "version", "license": "license", "abstract": "description"}
    assert {ours: citation[ours] for ours in fields} == {ours: setup_field(theirs) for ours, theirs in fields.items()}
    assert "Self-Rationale Calibration" in citation["references"][0]["title"]


def test_the_changelog_has_the_version_and_what_comes_after_it():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1] == setup_field("version")


def text_of(page: Path) -> str:
    """A page without its blocks of code, where nothing is a link or a heading."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_pages_and_pictures_lead_somewhere(page):
    text = text_of(page)
    for link in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'\b(?:src|srcset|href)="([^"]+)"', text)]:
        file, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_index_names_every_page_of_the_documentation():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| \[(\w+\.md)\]\(\1\)", index, re.MULTILINE))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_guide_names_files_that_exist():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:srcfast|kernels|csrc|benchmarks|docs|tests)/[\w./]*)`", guide)
    assert len(named) >= 40
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_the_guide_lists_every_package_in_the_order_of_imports():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(?:srcfast|kernels)/(\w+)(?:\.py|/)` \|", guide, re.MULTILINE)
    assert listed == [room for room in FLOORS if room != "__main__"]
