"""A run's directory and its telemetry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from srcfast.config.load import load_config
from srcfast.config.settings import Config
from srcfast.errors import ConfigError, InputError
from srcfast.run import progress as telemetry
from srcfast.run.directory import RunDirectory, StageMetrics
from srcfast.run.progress import peak_rss_bytes, track


def test_a_stage_is_done_once_it_is_finished_with_the_same_settings(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    settings = {"dpo": {"beta": 0.1, "targets": ("q_proj", "k_proj")}, "seed": 3}
    assert run.stage_done("dpo", settings) is None
    run.finish_stage("dpo", settings, seconds=2.5, tokens=700, pairs=12)
    again = RunDirectory(tmp_path / "run").stage_done("dpo", settings)
    assert again is not None
    assert (again["seconds"], again["tokens"], again["pairs"]) == (2.5, 700, 12)
    assert run.stage_done("rationale", settings) is None


def test_a_finished_stage_with_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.finish_stage("dpo", {"dpo": {"beta": 0.1, "epochs": 1}}, seconds=1.0)
    with pytest.raises(ConfigError, match=r"'dpo' finished with dpo.beta = 0.1, this run asks for 0.2.*Fix"):
        run.stage_done("dpo", {"dpo": {"beta": 0.2, "epochs": 1}})
    with pytest.raises(ConfigError, match="dpo.sft_weight = None"):
        run.stage_done("dpo", {"dpo": {"beta": 0.1, "epochs": 1, "sft_weight": 0.5}})


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{half", encoding="utf-8")
    with pytest.raises(InputError, match="manifest.json"):
        RunDirectory(tmp_path).stage_done("dpo", {})


def test_a_finished_stage_whose_files_or_entry_changed_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    adapter = run.adapter(1) / "adapter_model.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes(b"weights")
    run.finish_stage("iteration-1/dpo", {"seed": 3}, seconds=1.0, pairs=12)
    assert run.stage_done("iteration-1/dpo", {"seed": 3}) is not None
    adapter.write_bytes(b"weighty")
    with pytest.raises(InputError, match=r"adapter_model.safetensors: expected what stage 'iteration-1/dpo' wrote"):
        run.stage_done("iteration-1/dpo", {"seed": 3})
    adapter.unlink()
    with pytest.raises(InputError, match="no file"):
        run.stage_done("iteration-1/dpo", {"seed": 3})
    run.manifest_file.write_text(run.manifest_file.read_text().replace('"pairs": 12', '"pairs": 13'))
    with pytest.raises(
        InputError, match=r"manifest.json, field 'iteration-1/dpo': expected the entry as it was written"
    ):
        run.manifest()


def test_an_entry_holds_under_its_own_name_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.finish_stage("iteration-1/scores", {"seed": 3}, seconds=1.0)
    renamed = run.manifest_file.read_text().replace("iteration-1/scores", "iteration-2/scores")
    run.manifest_file.write_text(renamed)
    with pytest.raises(InputError, match="field 'iteration-2/scores': expected the entry as it was written"):
        run.stage_done("iteration-2/scores", {"seed": 3})


def test_settings_and_surroundings_are_written(tmp_path: Path) -> None:
    run, config = RunDirectory(tmp_path), load_config(None, ["seed=5"])
    run.write_config(config)
    assert Config.model_validate(yaml.safe_load(run.config_file.read_text())) == config
    environment = json.loads(run.environment_file.read_text())
    assert {"python", "torch", "transformers", "cpu", "cpus", "threads", "git_commit"} <= set(environment)
    assert not list(tmp_path.glob(".*.tmp"))  # what was written under another name was renamed


def test_places_are_those_of_the_design(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.adapter(0) == tmp_path / "rationale" / "adapter"
    assert run.adapter(2) == tmp_path / "iteration-2" / "adapter"


class Clock:
    """Stands in for `time`: tells what it was set to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_progress_lines_come_every_ten_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(telemetry, "time", clock)
    with track("candidates", 1000) as progress:
        for _ in range(16):
            clock.now += 2.0
            progress.advance(20, tokens=3000)
        assert capsys.readouterr().err.splitlines() == [
            "candidates 100/1000 samples, 10.0 samples/s, 1,500 tokens/s, 0:01:30 left",
            "candidates 200/1000 samples, 10.0 samples/s, 1,500 tokens/s, 0:01:20 left",
            "candidates 300/1000 samples, 10.0 samples/s, 1,500 tokens/s, 0:01:10 left",
        ]
    clock.now += 50.0
    assert capsys.readouterr().err == "candidates 320/1000 samples, 10.0 samples/s, 1,500 tokens/s, took 0:00:32\n"
    assert (progress.seconds, progress.tokens, progress.tokens_per_second) == (32.0, 48000, 1500.0)


def test_quiet_progress_says_nothing_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with track("dpo", 3, "steps", quiet=True) as progress:
        progress.advance(tokens=7)
    assert capsys.readouterr() == ("", "")
    assert progress.tokens == 7


def test_progress_ends_where_the_stage_fails() -> None:
    with pytest.raises(KeyError), track("dpo", 3, quiet=True) as progress:
        raise KeyError
    assert progress.seconds == progress.seconds  # the clock stands


def test_metrics_are_on_disk_at_once_and_appended(tmp_path: Path) -> None:
    file = tmp_path / "new" / "metrics.jsonl"
    metrics = StageMetrics(file)
    for step in range(2):
        metrics.write({"step": step, "loss": 0.5})
        assert len(file.read_text().splitlines()) == step + 1
    with pytest.raises(ValueError, match="JSON compliant"):
        metrics.write({"loss": float("nan")})
    assert len(file.read_text().splitlines()) == 2


def test_a_restarted_stage_has_the_rows_of_its_history_alone(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rationale, dpo = StageMetrics(file, "rationale"), StageMetrics(file, "iteration-1/dpo")
    rationale.write({"step": 0})
    for step in range(3):
        dpo.write({"step": step})
    dpo.restart([{"step": 0}, {"step": 1}])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    of_dpo = [{"stage": "iteration-1/dpo", "step": step} for step in (0, 1)]
    assert rows == [{"stage": "rationale", "step": 0}, *of_dpo]
    rationale.restart()
    assert [json.loads(line) for line in file.read_text().splitlines()] == of_dpo
    dpo.restart()
    assert not file.exists()


def test_peak_memory_is_in_bytes() -> None:
    assert 30e6 < peak_rss_bytes() < 64e9  # this process has numpy and torch loaded
