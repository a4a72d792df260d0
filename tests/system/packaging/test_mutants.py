"""The list of faults fits the source: each snippet is there once, and each fault has a test in its room."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from mutants.run_mutants import Fault, read_faults, select

ROOT = Path(__file__).parents[3]

FAULTS = read_faults()
# Rooms of files that are no package's.
ROOMS = {"calibrate.py": "cli", "units.py": "cli", "launch.py": "run", "distributed.py": "run"}


def room_of(file: str) -> str:
    package, part = Path(file).parts[:2]
    return {"kernels": "kernels", "csrc": "native"}.get(package) or ROOMS.get(part, part)


def functions(file: Path) -> set[str]:
    return {
        node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    }


def test_there_are_many_faults_in_all_rooms_and_none_twice() -> None:
    assert len(FAULTS) >= 100
    assert {fault.room for fault in FAULTS} >= {
        path.name for path in (ROOT / "tests" / "unit").iterdir() if path.is_dir()
    } - {
        "native",
        "__pycache__",
    }
    counts = Counter((fault.file, fault.find, fault.replace) for fault in FAULTS)
    assert [fault for fault, count in counts.items() if count > 1] == []
    assert [text for text, count in Counter(fault.breaks for fault in FAULTS).items() if count > 1] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.room}: {fault.breaks}")
def test_a_fault_changes_one_place_and_names_a_test_of_its_room(fault: Fault) -> None:
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.find) == 1, f"{fault.file}: {fault.find!r}"
    if fault.file.endswith(".py"):
        changed = ast.dump(ast.parse(text.replace(fault.find, fault.replace)))
        assert changed != ast.dump(ast.parse(text))
    assert fault.room == room_of(fault.file)
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert Path(file).parts[:3] == ("tests", "unit", fault.room)
        assert not name or name in functions(ROOT / file), test


def test_parts_are_disjoint_and_make_up_the_whole() -> None:
    parts = [select(FAULTS, f"{number}/10") for number in range(1, 11)]
    assert Counter(fault for part in parts for fault in part) == Counter(FAULTS)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ("0/10", "11/10", "3", "a/b", "1/0"):
        with pytest.raises(ValueError, match="--part"):
            select(FAULTS, wrong)
