"""The work list: stages in common are run once, a finished arm isn't run again, and processes take different items."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from helpers.small_run import write_study

from srcfast.errors import ConfigError
from srcfast.run.directory import RunDirectory
from srcfast.run.lock import lock_directory
from srcfast.run.shared_stages import share_stages
from srcfast.study import work_list
from srcfast.study.results import read_predictions, summarise
from srcfast.study.settings import Study, read_study
from srcfast.study.work_list import run_study

SHARED = [
    "base/evaluation",
    "rationale",
    "rationale/evaluation",
    *(f"iteration-1/{k}" for k in ("candidates", "headroom")),
]


def small_study(folder: Path, arms: dict[str, Any], **values: Any) -> Study:
    return read_study(write_study(folder, arms, **values))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[str]]:
    """A finished study of five arms, and what it reported."""
    random = {"curation": {"pairing": "random"}}
    study = small_study(
        tmp_path_factory.mktemp("study"),
        {
            "src": {"settings": random},
            "stronger": {"settings": random | {"dpo": {"beta": 0.5}}},
            "alone": {"settings": random | {"scorer": {"mode": "independent"}}},
            "sentence": {"settings": random | {"dpo": {"credit": "sentence"}}},
            "rationale": {"settings": {"iterations": 0}},
        },
        differences=["stronger - rationale"],
        resamples=100,
    )
    lines: list[str] = []
    run_study(study, True, lines.append)
    return study, lines


def manifest(study: Study, arm: str) -> dict[str, Any]:
    return RunDirectory(study.configs[arm, 0].run_path).manifest()


def test_stages_in_common_are_run_once(finished: tuple[Study, list[str]]) -> None:
    study, lines = finished
    first = manifest(study, "src")
    assert list(first)[: len(SHARED)] == SHARED
    stronger, alone, sentence = (manifest(study, arm) for arm in ("stronger", "alone", "sentence"))
    scored = [*SHARED, "iteration-1/scores", "iteration-1/preferences"]
    assert {name for name in first if stronger[name] == first[name]} == set(scored)
    # References are of other tokens with another credit.
    assert {name for name in first if sentence[name] == first[name]} == {*SHARED, "iteration-1/scores"}
    # The R-Scorer's settings differ: headroom and scores are others, and so is all that comes later.
    assert {name for name in first if alone[name] == first[name]} == set(SHARED) - {"iteration-1/headroom"}
    assert list(manifest(study, "rationale")) == SHARED[:3]
    assert manifest(study, "rationale")["rationale"] == first["rationale"]
    assert lines[0] == "src, seed 0 (1 of 5): 0 stages taken over"
    assert lines[1] == "stronger, seed 0 (2 of 5): 7 stages taken over"
    # Files are the same on disk, and an arm's metrics have the rows of what it took over.
    files = [
        study.configs[arm, 0].run_path / "rationale/adapter/adapter_model.safetensors" for arm in ("src", "stronger")
    ]
    assert files[0].samefile(files[1])
    rows = [
        json.loads(line) for line in (study.configs["stronger", 0].run_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["stage"] for row in rows].count("rationale") == first["rationale"]["metrics"]["rows"]


def test_a_run_that_continues_with_another_credit_is_refused(finished: tuple[Study, list[str]]) -> None:
    study = finished[0]
    for arm, credit in (("src", "sentence"), ("sentence", "response")):
        config = study.configs[arm, 0]
        changed = config.replace(dpo=config.dpo.replace(credit=credit))
        with pytest.raises(ConfigError, match="'iteration-1/preferences' finished with dpo.credit"):
            RunDirectory(config.run_path).check_finished(changed.identity())


def test_an_arm_s_result_is_that_of_its_calibration_alone(finished: tuple[Study, list[str]], tmp_path: Path) -> None:
    from srcfast.calibrate import calibrate

    study = finished[0]
    config = study.configs["stronger", 0].replace(output=str(tmp_path))
    calibrate(config)
    together = study.configs["stronger", 0].run_path
    for name in ("iteration-1/adapter/adapter_model.safetensors", "predictions/iteration-1/world-test.jsonl"):
        assert (tmp_path / "stronger-0" / name).read_bytes() == (together / name).read_bytes(), name


def test_a_finished_study_runs_nothing_again_and_an_arm_that_is_added_alone(
    finished: tuple[Study, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = finished[0]
    ran: list[str] = []
    monkeypatch.setattr(work_list, "calibrate", lambda config: ran.append(config.name))
    run_study(study, True, lambda line: None)
    assert ran == []


def test_a_run_that_has_to_go_on_for_another_round_is_not_finished(finished: tuple[Study, list[str]]) -> None:
    study = finished[0]
    assert all(work_list.is_finished(study, item) for item in study.configs)
    config = study.configs["src", 0]
    longer = Study(study.settings, {})
    longer.configs["src", 0] = config.replace(iterations=2)
    stored = RunDirectory(config.run_path).config_file
    before = stored.read_bytes()
    RunDirectory(config.run_path).write_config(longer.configs["src", 0])  # as a run does that is then stopped
    assert not work_list.is_finished(longer, ("src", 0))
    stored.write_bytes(before)


def test_rows_of_a_stopped_attempt_are_replaced_and_half_written_ones_left_out(
    finished: tuple[Study, list[str]], tmp_path: Path
) -> None:
    config = finished[0].configs["src", 0]
    source, target = RunDirectory(config.run_path), RunDirectory(tmp_path / "other")
    target.metrics_file.write_text('{"stage": "rationale", "step": 0}\n{"stage": "x"}\n', encoding="utf-8")
    with open(source.metrics_file, "a", encoding="utf-8") as file:
        file.write('{"stage": "iteration-2/dpo", "st')
    share_stages(source, target, config.identity())
    rows = [json.loads(line)["stage"] for line in target.metrics_file.read_text(encoding="utf-8").splitlines()]
    assert rows.count("rationale") == source.manifest()["rationale"]["metrics"]["rows"]
    assert (rows.count("x"), rows.count("iteration-2/dpo")) == (1, 0)


def test_a_summary_has_each_arm_and_difference_in_the_agreed_form(finished: tuple[Study, list[str]]) -> None:
    study = finished[0]
    summary = json.loads(json.dumps(summarise(study)))
    assert list(summary) == ["arms", "differences", "judges"]
    assert list(summary["arms"]) == ["src", "stronger", "alone", "sentence", "rationale"]
    predictions = {
        arm: [
            json.loads(line)
            for line in (study.configs[arm, 0].run_path / f"predictions/{model}/world-test.jsonl")
            .read_text()
            .splitlines()
        ]
        for arm, model in (("stronger", "iteration-1"), ("rationale", "rationale"))
    }
    for arm, rows in predictions.items():
        entry = summary["arms"][arm]
        assert entry["accuracy"][0] == pytest.approx(np.mean([row["right"] for row in rows]))
        assert entry["alignment"][0] == pytest.approx(np.mean([row["aligned"] for row in rows]))
        assert (entry["seeds"], entry["samples"]) == (1, 3)
    assert summary["arms"]["rationale"]["updates"] == 36  # 24 pairs by 4, in 6 epochs
    pairs = manifest(study, "stronger")["iteration-1/dpo"]["pairs"]
    assert summary["arms"]["stronger"]["updates"] == 36 + 2 * pairs
    difference = summary["differences"]["stronger - rationale"]["alignment"]
    expected = np.mean([row["aligned"] for row in predictions["stronger"]]) - np.mean(
        [row["aligned"] for row in predictions["rationale"]]
    )
    assert difference[0] == pytest.approx(expected)
    assert difference[1] <= difference[0] <= difference[2]


def test_the_command_writes_summary_tables_and_a_page_with_answers(
    finished: tuple[Study, list[str]], srcfast: Callable[..., Result], tmp_path: Path
) -> None:
    study = finished[0]
    file = study.settings.path.parent / "study.yaml"
    judges = tmp_path / "judges.json"
    figures = {"pairwise": [0.9, 0.8, 1.0], "independent": [0.7, 0.6, 0.8]}
    judges.write_text(json.dumps({"judges": {"2m": {"partial": figures}}}), encoding="utf-8")
    with_judges = tmp_path / "study.yaml"
    with_judges.write_text(f"{file.read_text(encoding='utf-8')}judges: {judges}\n", encoding="utf-8")
    result = srcfast("study", with_judges, "--output", tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary == json.loads(json.dumps(summarise(study) | {"judges": {"2m": {"partial": figures}}}))
    tables = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert "| stronger - rationale | " in tables
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    for cell in ("stronger - rationale", "90.0 (80.0 to 100.0)", "70.0 (60.0 to 80.0)", *study.settings.arms):
        assert cell in page, cell
    rows = {
        arm: read_predictions(study.configs[arm, 0], study.model(arm))["world-test"]
        for arm in ("rationale", "stronger")
    }
    differing = [pair for pair in zip(*rows.values(), strict=True) if pair[0]["aligned"] != pair[1]["aligned"]]
    assert page.count("<h3>") == min(2, len(differing))
    for pair in differing[:2]:
        assert all(html.escape(row["text"]) in page for row in pair)


def test_processes_take_different_items_and_wait_for_stages_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the claim of another process held, an arm that shares its stages waits, and one of another seed is taken."""
    study = small_study(tmp_path, {"one": {}, "two": {"settings": {"dpo": {"beta": 0.5}}}}, seeds=2)
    ran: list[str] = []

    class Waited(Exception):
        pass

    def calibrate(config: Any) -> None:
        ran.append(config.name)
        run = RunDirectory(config.run_path)
        run.write_config(config)
        run.summary_file.write_text("{}", encoding="utf-8")
        run.finish_stage("iteration-1/evaluation", {}, 1.0)

    def wait(seconds: float) -> None:
        raise Waited

    monkeypatch.setattr(work_list, "calibrate", calibrate)
    monkeypatch.setattr(work_list, "time", SimpleNamespace(sleep=wait))
    held = [study.settings.path / "claims" / "one-0"]
    real = work_list.lock_directory

    def lock(directory: Path) -> Any:
        # A process' locks don't shut out itself: what another one holds is refused here.
        if directory in held:
            raise work_list.SrcfastError("held")
        return real(directory)

    monkeypatch.setattr(work_list, "lock_directory", lock)
    with pytest.raises(Waited):
        run_study(study, True, lambda line: None)
    assert ran == ["one-1", "two-1"]
    held.clear()
    run_study(study, True, lambda line: None)
    assert ran == ["one-1", "two-1", "one-0", "two-0"]
    with lock_directory(study.settings.path / "claims" / "one-0"):
        pass  # no claim is left held
