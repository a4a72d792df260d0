"""The commands that write the world's samples out and draw a run's page anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from srcfast.cli import inputs, table
from srcfast.config.settings import Config
from srcfast.data.readers import read_samples
from srcfast.units import parse_bytes, show_bytes
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


@pytest.mark.parametrize(
    ("value", "interval", "shown"),
    [
        (0.5, [0.4, 0.62], "50.0 ± 11.0"),
        (0.0, [0.0, 0.0], "0.0 ± 0.0"),
        (1.0, None, "100.0"),
        (0.12345, [0.1, 0.2], "12.3 ± 5.0"),
        (None, None, "-"),
        (None, [0.1, 0.2], "-"),
    ],
)
def test_a_share_is_shown_with_half_of_its_interval(
    value: float | None, interval: list[float] | None, shown: str
) -> None:
    assert table._share(value, interval) == shown


def test_options_go_before_single_settings_and_these_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("name: of-the-file\nseed: 3\noutput: of the file\nmodel: {path: of the file}\n")
    words = [str(file), "model.path=single", "output=single", "seed=4"]
    read = inputs.settings(words, None)
    assert (read.name, read.seed, read.model.path, read.output) == ("of-the-file", 4, "single", "single")
    read = inputs.settings(words, None, model="option", output=Path("option"), quiet=True)
    assert (read.seed, read.model.path, read.output, read.quiet) == (4, "option", "option", True)
    assert inputs.settings(words, None, scorer="judge").scorer.path == "judge"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.TSV", "a.txt"])
@pytest.mark.parametrize(("use", "split"), [("evaluation", "test"), ("calibration", "train"), ("rationale", "train")])
def test_a_named_file_is_a_set_whose_format_its_records_decide(name: str, use: str, split: str) -> None:
    (dataset,) = inputs.datasets(Config(), inputs.Source(Path("folder") / name, None, None), use)
    assert (dataset.name, dataset.format, dataset.split, dataset.path) == ("a", "auto", split, f"folder/{name}")
    assert dataset.image_root is None and dataset.limit == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1k", 1000),
        ("1KiB", 1024),
        ("1MB", 10**6),
        ("1MiB", 2**20),
        ("2 g", 2 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("7", 7),
    ],
)
def test_a_size_is_read_in_thousands_or_in_1024s(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20, "1.0 MiB"),
        (2**30 * 12.3, "12.3 GiB"),
        (2**40, "1.0 TiB"),
    ],
)
def test_bytes_are_shown_in_1024s(count: float, shown: str) -> None:
    assert show_bytes(count) == shown
