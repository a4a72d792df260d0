"""Cost as work grows: every stage runs on made-up records, and growth is counted per tenfold of items."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from srcfast_benchmarks import growth


def test_all_stages_run_and_say_how_many_items_time_and_memory(tmp_path: Path) -> None:
    stages = growth.Stages(tmp_path, 20)
    counts = {stage.__name__: stage(stages) for stage in growth.STAGES}
    kept = len(stages.pairs)
    assert 0 < kept < 20
    assert counts == {
        "read_json_lines": 20,
        "read_easy_vqa": 20,
        "build_and_pack_trees": 20,
        "write_candidates": 160,
        "read_candidates": 160,
        "write_scores": 20,
        "curate": 20,
        "write_preferences": kept,
        "read_preferences": kept,
        "sum_up_answers": 20,
        "draw_report": 20,
    }
    assert (tmp_path / "report" / "index.html").is_file()


def test_growth_is_a_factor_per_tenfold_whatever_the_step() -> None:
    rows = [
        {"stage": "a", "items": items, "cpu_seconds": seconds, "peak_mebibytes": peak}
        for items, seconds, peak in ((10, 1.0, 0.5), (1000, 100.0, 2.0), (2000, 200.0, 4.0), (2000, 250.0, 4.0))
    ]
    first, second, third, same = growth.with_growth(rows)
    assert "time_growth" not in first and "time_growth" not in same  # nothing grew
    assert second["time_growth"] == pytest.approx(10.0) and "memory_growth" not in second  # from next to nothing
    assert third["time_growth"] == pytest.approx(10.0) and third["memory_growth"] == pytest.approx(10.0)


@pytest.mark.slow
def test_the_command_measures_each_size_in_a_process_of_its_own(tmp_path: Path) -> None:
    growth.main(device="cpu", output=tmp_path, samples="10,5", only=0)
    with open(tmp_path / "growth_cpu.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["samples"], row["stage"]) for row in rows] == [
        (size, stage.__name__.replace("_", " ")) for size in ("5", "10") for stage in growth.STAGES
    ]
    assert all(
        float(row["seconds"]) > 0 and float(row["cpu_seconds"]) > 0 and float(row["peak_mebibytes"]) >= 0
        for row in rows
    )
    assert {"cpu", "torch", "git_commit", "versions", "time_growth"} <= set(rows[0])
