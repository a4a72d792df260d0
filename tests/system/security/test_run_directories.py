"""A run goes on past bombs that lie in every folder of its directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from helpers.bombs import plant

SETTINGS = """
name: small
iterations: 1
quiet: true
model: {path: embedded}
scorer: {path: embedded}
data:
  train: [{name: world, format: world, split: train, limit: 64}]
  evaluation: [{name: world, format: world, split: test, limit: 4}]
lora: {r: 4, alpha: 8}
rationale: {samples: 64, epochs: 4, micro_batch_size: 8, gradient_accumulation_steps: 1, learning_rate: 2.0e-3}
candidates: {samples: 16, num_candidates: 4, max_sentence_tokens: 24, max_new_tokens: 96, batch_size: 16}
curation: {min_margin: 0.0, min_confidence: 0.0, max_length_ratio: 20.0}
dpo: {epochs: 1, micro_batch_size: 8, gradient_accumulation_steps: 1}
evaluation: {max_new_tokens: 64, batch_size: 8, bootstrap_resamples: 100, headroom_samples: 0}
"""


@pytest.mark.slow
def test_a_run_is_continued_among_bombs(srcfast: Callable[..., Result], tmp_path: Path, witness: Path) -> None:
    """In the run's folders, its checkpoints' and its adapters', before the run and again before it goes on."""
    config, run = tmp_path / "config.yaml", tmp_path / "runs" / "small"
    config.write_text(SETTINGS, encoding="utf-8")
    plant([run, run / "checkpoint", run / "checkpoint" / "step-00000001", run / "rationale" / "adapter"], witness)
    result = srcfast("calibrate", config, f"output={run.parent}")
    assert result.exit_code == 0, (result.output, result.exception)
    assert not witness.exists()
    plant([folder for folder in (run, *run.rglob("*")) if folder.is_dir()], witness)
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    left = {name: entry for name, entry in manifest.items() if "iteration-1/dpo" != name and "evaluation" not in name}
    (run / "manifest.json").write_text(json.dumps(left), encoding="utf-8")
    result = srcfast("calibrate", config, f"output={run.parent}")
    assert result.exit_code == 0, (result.output, result.exception)
    assert set(json.loads((run / "manifest.json").read_text(encoding="utf-8"))) == set(manifest)
    assert not witness.exists()
