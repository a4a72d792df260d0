"""Rules of the house that a reader relies on: which way imports run, how long a file gets, what never occurs."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "srcfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# A room may import those of its own level and below.
LEVELS = {
    "__main__": 8,
    "cli": 7,
    "tools": 6,
    "commands": 5,
    "calibrate": 4,
    "loading": 4,
    "stages": 3,
    "models": 2,
    "report": 2,
    "world": 2,
    "config": 1,
    "runtime": 1,
    "data": 0,
    "errors": 0,
    "srcfast_kernels": 0,
}
# easy-VQA speaks the world's grammar: its questions are read into the world's programs, so that the oracle can check them.
# Settings name the types they make, for type checkers alone.
EXCEPTIONS = {("data/easy_vqa.py", "world")}


def room(file: Path) -> str:
    parts = file.relative_to(ROOT).parts
    return "srcfast_kernels" if parts[0] == "kernels" else parts[1].removesuffix(".py")


def imported_rooms(file: Path) -> set[str]:
    """Rooms that a file imports when it is loaded (imports inside functions and for types alone are later or never)."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "srcfast_kernels":
                found.add("srcfast_kernels")
            elif parts[0] == "srcfast" and len(parts) > 1:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file):
    own = room(file)
    if own == "__init__":
        return
    short = "/".join(file.relative_to(ROOT).parts[1:])
    for other in imported_rooms(file):
        if (short, other) not in EXCEPTIONS:
            assert LEVELS[other] <= LEVELS[own], f"{short} ({own}) imports {other}"


def test_the_runtime_knows_no_models():
    for file in (ROOT / "srcfast" / "runtime").glob("*.py"):
        assert not imported_rooms(file) & {"models", "stages", "world", "report", "config"}, file


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_long_or_does_what_is_forbidden(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 600
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for forbidden in (
        r"^\s*(?:import|from) pickle",
        r"torch\.(?:load|save)\(",
        r"trust_remote_code=True",
        r"yaml\.(?:load|unsafe_load)\(",
        r"(?<![\w.])eval\(",
        r"NotImplementedError",
        r"\b(?:TODO|FIXME)\b",
    ):
        assert not re.search(forbidden, code, re.MULTILINE), f"{file} has {forbidden}"
