"""The examples' settings load, their commands and options exist, and each stage fits the memory that they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from helpers.published_configs import write_published
from helpers.shapes_7b import write_configs

from srcfast.cli.app import app
from srcfast.config.load import load_config
from srcfast.memory.plan import STAGES, forecast_stage
from srcfast.units import parse_bytes

ROOT = Path(__file__).parents[3]
# The published config of the model that each example names.
MODELS = {"workstation-24GB": "Qwen2.5-VL-7B", "node-8x80GB": "Qwen2.5-VL-7B", "tight-12GB": "Qwen3-VL-4B"}


def test_all_examples_are_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.yaml")} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_each_stage_fits(name: str, tmp_path: Path) -> None:
    scorer = write_configs(tmp_path)[1]
    paths = [f"model.path={write_published(MODELS[name], tmp_path)}", f"scorer.path={scorer}"]
    config = load_config(ROOT / "examples" / f"{name}.yaml", paths)
    assert config.memory is not None and config.memory.removesuffix("iB") + "B" == re.sub(r".*-(\d+x)?", "", name)
    memory = parse_bytes(config.memory)
    peaks = {stage: forecast_stage(config, stage, memory=memory).peak / memory for stage in STAGES}
    assert max(peaks.values()) <= 0.9, peaks


@pytest.mark.parametrize("name", MODELS)
def test_the_commands_at_its_head_exist(name: str) -> None:
    text = (ROOT / "examples" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"models/{MODELS[name]}-Instruct" in text
    head = re.sub(
        r"^# ?", "", "\n".join(line for line in text.splitlines() if line.startswith("#")), flags=re.MULTILINE
    )
    lines = [shlex.split(line, comments=True) for line in head.replace("\\\n", " ").splitlines() if "srcfast " in line]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert [words[words.index("srcfast") + 1] for words in lines] == ["teach", "scorer", "estimate", "calibrate"]
    for words in lines:
        command, *options = words[words.index("srcfast") + 1 :]
        known = {option for parameter in commands[command].params for option in parameter.opts}
        assert {word for word in options if word.startswith("--")} <= known
        settings = [word for word in options if re.match(r"[a-z_.]+=", word)]
        assert load_config(ROOT / f"examples/{name}.yaml", settings).name == name.split("-")[0]
