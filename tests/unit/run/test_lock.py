"""A lock is a file of its directory, never somebody's link."""

from __future__ import annotations

from pathlib import Path

import pytest

from srcfast.errors import SrcfastError
from srcfast.run.lock import lock_directory


def test_a_link_in_the_lock_s_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(
            SrcfastError, match=r"run: expected a directory that can be written, found \.lock, which is a link"
        ),
        lock_directory(tmp_path / "run"),
    ):
        pytest.fail("it went on")
    assert (tmp_path / "precious").read_text() == "text"


def test_a_lock_names_its_holder(tmp_path: Path) -> None:
    with lock_directory(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith("process ")
