"""`distributed.shard=true`: a whole calibration with the base shared out over ranks writes what one with whole bases writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.rank_runs import RankServer
from test_calibration_over_ranks import SETTINGS, calibrate

COMPARED = ("rationale/adapter", "iteration-1", "predictions")


@pytest.mark.slow
def test_a_calibration_on_a_shared_base_writes_the_same_bytes(server: RankServer, tmp_path: Path) -> None:
    runs = []
    for shared in ("false", "true"):
        config = tmp_path / f"{shared}.yaml"
        # In fp32 a whole base takes the adapter into its weights to decode, which rounds otherwise.
        text = SETTINGS.replace("{path: embedded}", "{path: embedded, dtype: bfloat16}", 1)
        # Still two pieces of each stage that works in pieces, of which one rank's is smaller.
        text = text.replace("candidates: {samples: 16", "candidates: {samples: 10").replace("limit: 12", "limit: 10")
        config.write_text(f"{text}distributed: {{shard: {shared}}}\n", encoding="utf-8")
        runs.append(calibrate(server, 2, config, tmp_path / shared))
    whole, shared_out = ({file.relative_to(run): file.read_bytes() for file in files(run)} for run in runs)
    assert len(whole) > 10
    assert shared_out == whole


def files(run: Path) -> list[Path]:
    found = [file for folder in COMPARED for file in (run / folder).rglob("*") if file.is_file()]
    return [file for file in found if "checkpoint" not in file.parts]
