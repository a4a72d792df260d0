"""The page of promises names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def names_of_tests(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_promise_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    promises = [
        line
        for line in page.splitlines()
        if line.startswith("| ") and not line.startswith(("| promise", "| fault", "| ---"))
    ]
    assert len(promises) >= 30
    for line in promises:
        named = NAMED.findall(line)
        assert named, f"names no test: {line}"
        for file, name in named:
            assert (ROOT / file).is_file() and name in names_of_tests(ROOT / file), f"{file}::{name}"
