"""The notebook runs from top to bottom with smaller numbers, without Jupyter, and stores no outputs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
NOTEBOOK = json.loads((ROOT / "examples" / "calibrate_embedded.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SIZES = "RATIONALES, EPOCHS, QUESTIONS, TEST = 150, 8, 200, 200"
# All cells in one namespace, each by its number, so that an error names it.
RUN = """
import json, sys
namespace = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    exec(compile(source, f"cell {number}", "exec"), namespace)
"""


def test_no_outputs_are_stored() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 4)
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        assert cell["metadata"] == {}


def test_its_links_lead_somewhere() -> None:
    text = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all((ROOT / "examples" / link).exists() for link in links)


def run_cells(cells: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(cells),
        capture_output=True,
        text=True,
        timeout=900,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def written(folder: Path) -> Any:
    summary = json.loads((folder / "runs" / "notebook" / "summary.json").read_text(encoding="utf-8"))
    return [(row["model"], row["n"]) for row in summary["evaluations"]]


@pytest.mark.slow
def test_its_cells_run_in_order_and_again(tmp_path: Path) -> None:
    cells = [cell.replace(SIZES, "RATIONALES, EPOCHS, QUESTIONS, TEST = 48, 4, 16, 8") for cell in CODE]
    assert sum(ours != theirs for ours, theirs in zip(cells, CODE, strict=True)) == 1
    said = run_cells(cells, tmp_path)
    assert written(tmp_path) == [("base", 8), ("rationale", 8), ("iteration-1", 8)]
    assert (
        said.count("<PIL.Image.Image ") == 9
    )  # pictures of six samples and of three with candidates, shown as what they are
    scores = [float(number) for number in re.findall(r"^  (\d\.\d\d)  ", said, re.MULTILINE)]
    assert len(scores) > 3 and all(0 <= score <= 1 for score in scores)
    assert said.count("aligned:") == 3
    changed, compared = map(int, re.findall(r"(\d+) of (\d+) responses changed", said)[0])
    assert 0 <= changed <= compared == 8
    assert (tmp_path / "runs" / "notebook" / "report" / "index.html").is_file()
    before = (tmp_path / "runs" / "notebook" / "metrics.jsonl").read_bytes()
    run_cells(cells, tmp_path)
    assert (tmp_path / "runs" / "notebook" / "metrics.jsonl").read_bytes() == before
