"""What reaches a tracker: each step once over all attempts, on rank zero alone, nothing to a network, no error to the run."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from srcfast import distributed
from srcfast.config.settings import Config
from srcfast.errors import ConfigError, Interrupted
from srcfast.trackers import tracking as module
from srcfast.trackers.protocol import LoggedSteps
from srcfast.trackers.tracking import Trackers, check_installed, numbers_of, results_of, tracking

SERVERS = ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_DIR")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SERVERS, *module.ENVIRONMENT):
        monkeypatch.setenv(name, "x")  # so that what is set in a test is taken back
        monkeypatch.delenv(name)


class StandIns:
    """Stand-ins for the packages: they record what they are asked for, in `calls`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails = ""  # the call that raises

    def _record(self, *call: Any) -> None:
        if call[0] == self.fails:
            raise RuntimeError(f"{call[0]} failed")
        self.calls.append(call)

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]

    def wandb(self) -> ModuleType:
        record = self._record

        def init(**options: Any) -> SimpleNamespace:
            record("init", options)
            return SimpleNamespace(
                id=options["id"],
                define_metric=lambda name, step_metric: record("define", name, step_metric),
                log=lambda values, step, commit: record("log", step, values),
                finish=lambda exit_code: record("finish", exit_code),
            )

        made = ModuleType("wandb")
        made.init, made.Settings = init, lambda **options: options  # type: ignore[attr-defined]
        return made

    def trackio(self) -> tuple[ModuleType, ModuleType]:
        record = self._record

        def init(**options: Any) -> SimpleNamespace:
            record("init", options)
            return SimpleNamespace(id="of-trackio", log=lambda values, step: record("log", step, values))

        made, utils = ModuleType("trackio"), ModuleType("trackio.utils")
        made.init, made.finish = init, lambda: record("finish")  # type: ignore[attr-defined]
        utils.TRACKIO_DIR = Path(os.environ.get("TRACKIO_DIR", "/home/elsewhere"))  # type: ignore[attr-defined]
        return made, utils

    def mlflow(self) -> tuple[ModuleType, ModuleType]:
        record = self._record

        class MlflowClient:
            def __init__(self, tracking_uri: str) -> None:
                record("client", tracking_uri)

            def get_experiment_by_name(self, name: str) -> None:
                record("experiment", name)

            def create_experiment(self, name: str, artifacts: str | None) -> str:
                record("new experiment", name, artifacts)
                return "7"

            def create_run(self, number: str, run_name: str) -> SimpleNamespace:
                record("new run", number, run_name)
                return SimpleNamespace(info=SimpleNamespace(run_id="of-mlflow"))

            def update_run(self, run: str, status: str) -> None:
                record("update", run, status)

            def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
                if params:
                    record("params", run, dict(params))
                else:
                    record("log", run, [(key, value, step) for key, value, _, step in metrics])

            def set_terminated(self, run: str, status: str) -> None:
                record("end", run, status)

        made, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
        made.MlflowClient = MlflowClient  # type: ignore[attr-defined]
        entities.Metric = lambda *values: values  # type: ignore[attr-defined]
        entities.Param = lambda key, value: (key, value)  # type: ignore[attr-defined]
        return made, entities

    def tensorboard(self) -> ModuleType:
        record = self._record

        class SummaryWriter:
            def __init__(self, folder: Path, purge_step: int | None) -> None:
                record("open", str(folder), purge_step)
                self.folder = Path(folder).name

            def add_scalar(self, name: str, value: float, step: int) -> None:
                record("log", self.folder, name, value, step)

            def flush(self) -> None:
                record("flush", self.folder)

            def close(self) -> None:
                record("close", self.folder)

        made = ModuleType("torch.utils.tensorboard")
        made.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
        return made


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """Stand-ins for all four packages; trackio's folder is the one of its first import, as it is with the real one."""
    made = StandIns()
    monkeypatch.setitem(sys.modules, "wandb", made.wandb())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made.tensorboard())
    mlflow, entities = made.mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return made


def config_of(name: str) -> Config:
    return Config.model_validate({"name": "demo", "trackers": [name]})


def steps(trackers: Trackers, stage: str, numbers: Mapping[int, float]) -> None:
    for step, loss in numbers.items():
        trackers.log(stage, step, {"step": step, "loss": loss, "mfu": None})


def two_attempts(name: str, run: Path) -> None:
    """A training that is stopped after step 3, two steps of it saved, and continued to step 4; an evaluation before and after."""
    try:
        with tracking(config_of(name), run) as trackers:
            trackers.log("evaluation", 0, {"a": {"accuracy": 0.25}})
            steps(trackers, "dpo", {0: 9.0, 1: 8.0, 2: 7.0, 3: 6.0})
            raise Interrupted(15)
    except Interrupted:
        pass
    with tracking(config_of(name), run) as trackers:
        steps(trackers, "dpo", {0: 9.0, 1: 8.0, 2: 7.5, 3: 6.5, 4: 5.5})
        trackers.log("evaluation", 1, {"a": {"accuracy": 0.5}})


def test_wandb_has_each_step_once_under_one_id(stand_ins: StandIns, tmp_path: Path) -> None:
    two_attempts("wandb", tmp_path)
    first, second = stand_ins.of("init")
    assert first[0]["id"] == second[0]["id"] == json.loads((tmp_path / "trackers/wandb.json").read_text())["run"]
    assert [options["mode"] for (options,) in (first, second)] == ["offline", "offline"]
    assert first[0]["dir"] == tmp_path / "trackers" and first[0]["resume"] is None and first[0]["name"] == "demo"
    assert stand_ins.of("log") == [
        (0, {"evaluation/a/accuracy": 0.25, "evaluation/step": 0}),
        (1, {"dpo/loss": 9.0, "dpo/step": 0}),
        (2, {"dpo/loss": 8.0, "dpo/step": 1}),
        (3, {"dpo/loss": 7.0, "dpo/step": 2}),
        (4, {"dpo/loss": 6.0, "dpo/step": 3}),
        (5, {"dpo/loss": 5.5, "dpo/step": 4}),
        (6, {"evaluation/a/accuracy": 0.5, "evaluation/step": 1}),
    ]
    assert stand_ins.of("finish") == [(1,), (0,)]
    assert ("dpo/*", "dpo/step") in stand_ins.of("define")


def test_what_wandb_had_buffered_when_it_was_killed_is_logged_again(stand_ins: StandIns, tmp_path: Path) -> None:
    killed = tracking(config_of("wandb"), tmp_path)
    steps(killed.__enter__(), "dpo", {0: 9.0, 1: 8.0})  # and nothing is closed
    with tracking(config_of("wandb"), tmp_path) as trackers:
        steps(trackers, "dpo", {0: 9.0, 1: 8.0})
    assert [step for step, _ in stand_ins.of("log")] == [0, 1, 0, 1]
    assert len({options["id"] for (options,) in stand_ins.of("init")}) == 1


def test_the_user_s_mode_of_wandb_wins(stand_ins: StandIns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with tracking(config_of("wandb"), tmp_path):
        pass
    ((options,),) = stand_ins.of("init")
    assert (options["mode"], options["resume"]) == ("online", "allow")


def test_mlflow_has_each_step_once_in_one_run(stand_ins: StandIns, tmp_path: Path) -> None:
    two_attempts("mlflow", tmp_path)
    assert stand_ins.of("client") == 2 * [(f"sqlite:///{tmp_path}/trackers/mlflow.db",)]
    assert stand_ins.of("new experiment") == [("srcfast", f"{tmp_path}/trackers/mlflow-artifacts")]
    assert stand_ins.of("new run") == [("7", "demo")] and stand_ins.of("update") == [("of-mlflow", "RUNNING")]
    assert [values for _, values in stand_ins.of("log")] == [
        [("evaluation/a/accuracy", 0.25, 0)],
        *([("dpo/loss", loss, step)] for step, loss in ((0, 9.0), (1, 8.0), (2, 7.0), (3, 6.0), (4, 5.5))),
        [("evaluation/a/accuracy", 0.5, 1)],
    ]
    assert stand_ins.of("end") == [("of-mlflow", "KILLED"), ("of-mlflow", "FINISHED")]
    params = {key: value for _, batch in stand_ins.of("params") for key, value in batch.items()}
    assert params["lora.r"] == "64" and max(len(batch) for _, batch in stand_ins.of("params")) == 100


def test_mlflow_s_server_and_names_are_those_that_it_takes(
    stand_ins: StandIns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    with tracking(config_of("mlflow"), tmp_path) as trackers:
        trackers.log("evaluation", 0, {"a(b)%": {"accuracy": 1}})
    assert stand_ins.of("client") == [("http://tracking:5000",)]
    assert stand_ins.of("new experiment") == [("srcfast", None)]
    assert stand_ins.of("log") == [("of-mlflow", [("evaluation/a_b__/accuracy", 1, 0)])]


@pytest.fixture
def trackio(stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIns]:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "run" / "trackers" / "trackio"))
    made, utils = stand_ins.trackio()
    monkeypatch.delenv("TRACKIO_DIR")
    monkeypatch.setitem(sys.modules, "trackio", made)
    monkeypatch.setitem(sys.modules, "trackio.utils", utils)
    yield stand_ins


def test_trackio_has_each_step_once_in_one_run(trackio: StandIns, tmp_path: Path) -> None:
    two_attempts("trackio", tmp_path / "run")
    assert [options["resume"] for (options,) in trackio.of("init")] == ["never", "allow"]
    assert [(step, values.get("dpo/loss")) for step, values in trackio.of("log")] == [
        (0, None),
        (1, 9.0),
        (2, 8.0),
        (3, 7.0),
        (4, 6.0),
        (5, 5.5),
        (6, None),
    ]
    assert "TRACKIO_DIR" not in os.environ and len(trackio.of("finish")) == 2


def test_trackio_does_not_write_into_another_run(trackio: StandIns, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="Fix: set TRACKIO_DIR"):
        check_installed(config_of("trackio"), tmp_path / "other")  # as an arm of a study does, which goes on
    with pytest.warns(RuntimeWarning, match="Fix: set TRACKIO_DIR"), tracking(config_of("trackio"), tmp_path / "other"):
        pass
    assert trackio.calls == []


def test_tensorboard_takes_back_from_the_first_step_that_comes_again(stand_ins: StandIns, tmp_path: Path) -> None:
    two_attempts("tensorboard", tmp_path)
    folder = tmp_path / "trackers" / "tensorboard"
    assert stand_ins.of("open") == [
        (f"{folder}/evaluation", 0),
        (f"{folder}/dpo", 0),
        (f"{folder}/dpo", 0),
        (f"{folder}/evaluation", 1),
    ]
    assert stand_ins.of("log")[-2:] == [("dpo", "loss", 5.5, 4), ("evaluation", "a/accuracy", 0.5, 1)]
    assert len(stand_ins.of("flush")) == 11 and len(stand_ins.of("close")) == 4


def test_a_stage_that_comes_again_within_a_process_takes_nothing_back(stand_ins: StandIns, tmp_path: Path) -> None:
    with tracking(config_of("tensorboard"), tmp_path) as trackers:
        for stage, step in (("evaluation", 0), ("dpo", 0), ("evaluation", 1)):
            trackers.log(stage, step, {"loss": 1.0})
    assert [purge for _, purge in stand_ins.of("open")] == [0, 0, None]


def test_the_real_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_attempts("tensorboard", tmp_path)
    shown = EventAccumulator(str(tmp_path / "trackers" / "tensorboard" / "dpo")).Reload().Scalars("loss")
    assert [(one.step, one.value) for one in shown] == [(0, 9.0), (1, 8.0), (2, 7.5), (3, 6.5), (4, 5.5)]
    shown = EventAccumulator(str(tmp_path / "trackers" / "tensorboard" / "evaluation")).Reload().Scalars("a/accuracy")
    assert [(one.step, one.value) for one in shown] == [(0, 0.25), (1, 0.5)]


def test_other_ranks_than_zero_have_no_tracker(
    stand_ins: StandIns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "is_rank_zero", lambda: False)
    with tracking(config_of("wandb"), tmp_path) as trackers:
        assert not trackers
        trackers.log("dpo", 0, {"loss": 1.0})
    assert stand_ins.calls == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_missing_package_is_an_error_with_the_command_that_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    monkeypatch.setitem(sys.modules, missing, None)  # as Python marks what can't be imported
    with pytest.raises(ConfigError, match=rf"expected {name}, .*Fix: pip install 'srcfast\[{name}\]'"):
        check_installed(config_of(name), tmp_path)
    check_installed(Config(), tmp_path)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true" and os.environ["WANDB_ERROR_REPORTING"] == "false"


@pytest.mark.parametrize("fails", ["init", "define", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(fails: str, stand_ins: StandIns, tmp_path: Path) -> None:
    stand_ins.fails = fails
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tracking(Config.model_validate({"trackers": ["wandb", "mlflow"]}), tmp_path) as trackers:
            if fails == "log":  # of W&B alone
                stand_ins.fails = ""
                trackers._trackers["wandb"].log = lambda *_: 1 / 0  # type: ignore[method-assign]
            steps(trackers, "dpo", {0: 9.0, 1: 8.0})
    assert [str(warning.message).partition(":")[0] for warning in caught] == ["tracker wandb"]
    assert "metrics.jsonl has all numbers" in str(caught[0].message)
    assert [values for run, values in stand_ins.of("log") if run == "of-mlflow"] == [
        [("dpo/loss", 9.0, 0)],
        [("dpo/loss", 8.0, 1)],
    ]


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"run": 1, "count": 0, "steps": {}}', '{"run": "a", "count": 0, "steps": {"b": "c"}}']
)
def test_a_damaged_file_of_steps_begins_a_new_run(text: str, tmp_path: Path) -> None:
    file = tmp_path / "wandb.json"
    file.write_text(text)
    with pytest.warns(RuntimeWarning, match=r"wandb\.json: expected the steps that were logged"):
        logged = LoggedSteps(file)
    assert not logged.continued and logged.is_new("dpo", 0) and logged.count == 0 and len(logged.run) == 32


def test_finite_numbers_alone_are_logged() -> None:
    values = {"a": 1, "b": {"c": 0.5, "d": {"e": 2}}, "f": None, "g": "x", "h": [1], "i": True, "j": float("nan")}
    assert numbers_of(values) == {"a": 1, "b/c": 0.5, "b/d/e": 2}


def test_results_make_a_curve_over_the_rounds() -> None:
    entry = {"dataset": "d", "split": "s", "n": 4, "accuracy": 0.5, "alignment": None, "by_ability": {"x": {"n": 4}}}
    numbers = {"d-s/n": 4, "d-s/accuracy": 0.5}
    names = {"base": 0, "rationale": 1, "iteration-1": 2, "iteration-2": 3}
    for of, step in names.items():
        assert results_of(f"{of}/evaluation", {"entries": [entry]}) == ("evaluation", step, numbers)
    measured = {"entries": [entry | {"iteration": 2}], "memory": {"bytes": 1}}
    assert results_of("iteration-2/headroom", measured) == ("headroom", 2, numbers)
    curated = {"funnel": {"kept": 3, "dropped": {"margin": 1}}, "settings": {"seed": 0}, "seconds": 2.0}
    numbers = {"funnel/kept": 3, "funnel/dropped/margin": 1}
    assert results_of("iteration-1/preferences", curated) == ("preferences", 1, numbers)
    assert results_of("rationale", {"pairs": 3, "seconds": 1.0}) == ("rationale", 0, {})
