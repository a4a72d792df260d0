"""A study of two arms on two ranks gives the figures that one rank gives; stages in common are run once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.rank_runs import RankServer

from srcfast.run.directory import RunDirectory

SETTINGS = """
seed: "{seed}"
iterations: 1
quiet: true
threads: 1
model: {path: embedded}
scorer: {path: embedded}
data:
  train:
    - {name: world, format: world, split: train, limit: 24, use: [rationale]}
    - {name: world-fresh, format: world, split: train, seed: 1, limit: 16, use: [calibration]}
  evaluation:
    - {name: world, format: world, split: test, limit: 8}
lora: {r: 8, alpha: 16}
rationale: {samples: 24, epochs: 6, micro_batch_size: 5, gradient_accumulation_steps: 1, learning_rate: 2.0e-3}
candidates: {samples: 16, num_candidates: 3, max_sentence_tokens: 24, max_new_tokens: 96, batch_size: 1}
curation: {min_margin: 0.0, min_confidence: 0.0, min_rating: 0.0}
dpo: {epochs: 1, micro_batch_size: 6, gradient_accumulation_steps: 1}
evaluation: {max_new_tokens: 96, batch_size: 1, bootstrap_resamples: 100, headroom_samples: 3}
"""


def write_study(folder: Path) -> Path:
    """Write a study whose runs are below `folder`/runs."""
    folder.mkdir(parents=True)
    tree = {
        "name": "small",
        "output": str(folder / "runs"),
        "seeds": 1,
        "resamples": 100,
        "settings": yaml.safe_load(SETTINGS),
        "arms": {"rationale": {"settings": {"iterations": 0}}, "src": {}},
        "differences": ["src - rationale"],
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return file


def run(server: RankServer, ranks: int, folder: Path) -> dict[str, object]:
    """Run the study on so many ranks, and return its summary without what depends on time."""
    study = write_study(folder)
    attempt = server.srcfast(ranks, folder / "logs", ["study", str(study), "--output", str(folder / "result")])
    assert attempt.statuses == [0] * ranks, "\n".join(attempt.said)[-4000:]
    summary = json.loads((folder / "result" / "summary.json").read_text())
    return {name: summary[name] for name in ("arms", "differences")}


def figures(value: object) -> list[float]:
    """List the numbers of a summary in order, without seconds."""
    if isinstance(value, dict):
        return [x for name, each in value.items() if "seconds" not in name for x in figures(each)]
    if isinstance(value, list):
        return [x for each in value for x in figures(each)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.slow
def test_a_study_on_ranks_gives_what_one_rank_gives(server: RankServer, tmp_path: Path) -> None:
    alone, together = (run(server, ranks, tmp_path / str(ranks)) for ranks in (1, 2))
    assert len(figures(alone)) > 20
    # On other ranks gradients are summed in another order: weights differ by rounding, answers to these eight questions do not.
    assert figures(together) == pytest.approx(figures(alone), abs=1e-6)
    runs = [RunDirectory(tmp_path / "2" / "runs" / "small" / f"{arm}-0").manifest() for arm in ("rationale", "src")]
    assert all(runs[0][stage] == runs[1][stage] for stage in ("base/evaluation", "rationale", "rationale/evaluation"))
