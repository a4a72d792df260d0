"""The commands that write the world's samples out and draw a run's page anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from srcfast.data.readers import read_samples
from srcfast.world.samples import world_samples

Srcfast = Callable[..., Result]


def test_written_samples_read_back_as_those_drawn(srcfast: Srcfast, tmp_path: Path) -> None:
    done = srcfast("world", "--output", tmp_path, "--split", "validation", "--samples", 7, "--seed", 5)
    assert done.exit_code == 0, done.output
    rejected: list[dict[str, object]] = []
    read = read_samples(tmp_path / "validation.jsonl", format="jsonl", image_root=tmp_path, rejected=rejected)
    drawn = world_samples("validation", 7, 5, image_dir=tmp_path / "again")
    assert not rejected
    same = ("id", "question", "answer", "rationale", "facts")
    assert [[getattr(s, name) for name in same] for s in read] == [[getattr(s, name) for name in same] for s in drawn]
    assert [s.extra["scene"] for s in read] == [json.loads(json.dumps(s.extra["scene"])) for s in drawn]


def test_an_unknown_split_is_refused_by_name(srcfast: Srcfast, tmp_path: Path) -> None:
    done = srcfast("world", "--output", tmp_path, "--split", "trian")
    assert done.exit_code == 2
    assert "trian" in done.output and "validation" in done.output


def test_report_draws_the_page_and_names_a_directory_that_is_no_run(srcfast: Srcfast, tmp_path: Path) -> None:
    refused = srcfast("report", tmp_path)
    assert refused.exit_code == 2 and "summary.json" in refused.output
    (tmp_path / "summary.json").write_text("{}")
    done = srcfast("report", tmp_path)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report" / "index.html").is_file()
