"""A run that is moved, in mid-training or when it is done, goes on as if it had been begun in its new place."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.small_run import ADAPTERS, STAGES, Server, assert_same, finished_stages

PICTURE = re.compile(r'<img[^>]+src="data:image/[a-z]+;base64,')


def moved(old: Path, new: Path) -> Path:
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(old, new)
    return new


@pytest.mark.parametrize(
    "training, step, point",
    [
        ("iteration-1/dpo", 4, "open checkpoint/iteration-1/dpo/.step-00000006"),
        pytest.param("rationale", 16, "open checkpoint/rationale/.step-00000020", marks=pytest.mark.fault),
    ],
)
def test_stopped_in_mid_training_and_moved_a_run_goes_on_byte_for_byte(
    server: Server, truth: dict[str, Any], tmp_path: Path, training: str, step: int, point: str
) -> None:
    old = tmp_path / "old"
    # Killed at a point behind this save: its steps must not be done again, those that come after it must.
    assert server.run(old, {"kind": "kill", "only": point}).status == -signal.SIGKILL
    new = moved(old, tmp_path / "elsewhere" / "new")
    saved = sorted(path.name for path in (new / "small" / "checkpoint" / training).glob("step-*"))
    assert saved[-1] == f"step-{step:08d}"
    attempt = server.run(new, {"kind": "kill", "only": f"os.mkdir checkpoint/{training}/.step-{step:08d}"})
    assert attempt.status == 0 and attempt.points == [], attempt.said  # no step was done twice
    assert "Warning" not in attempt.said
    assert_same(new / "small", truth)
    assert str(old) not in (new / "small" / "gallery.json").read_text(encoding="utf-8")


def test_a_finished_run_that_is_moved_has_all_stages_done_and_shows_its_pictures(
    server: Server, undisturbed: Path, truth: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(undisturbed.parent, tmp_path / "first")
    new = moved(tmp_path / "first", tmp_path / "elsewhere" / "second")
    before = {name: (new / "small" / name / "adapter_model.safetensors").stat().st_mtime_ns for name in ADAPTERS}
    pictures = len(PICTURE.findall((new / "small" / "report" / "index.html").read_text(encoding="utf-8")))
    (new / "small" / "report" / "index.html").unlink()
    hidden = undisturbed.parent.with_name("hidden")
    undisturbed.parent.rename(hidden)  # nothing is read from the old place
    try:
        attempt = server.run(new, {"kind": "kill", "only": "os.rename manifest.json"})
    finally:
        hidden.rename(undisturbed.parent)
    assert attempt.status == 0, attempt.said
    assert tuple(finished_stages(new / "small")) == STAGES
    assert {
        name: (new / "small" / name / "adapter_model.safetensors").stat().st_mtime_ns for name in ADAPTERS
    } == before
    page = (new / "small" / "report" / "index.html").read_text(encoding="utf-8")
    assert len(PICTURE.findall(page)) == pictures > 0 and "image not available" not in page
    assert_same(new / "small", truth)
