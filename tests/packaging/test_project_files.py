"""The files that a visitor reads first agree with setup.py."""

import hashlib
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
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
