"""The demo's commands are those of the Makefile, of its settings' head and of its measurement, and its settings load."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from srcfast.cli.app import app
from srcfast.config.load import load_config
from srcfast_benchmarks.demo import COMMANDS

ROOT = Path(__file__).parents[3]


def test_the_makefile_and_the_head_of_the_settings_name_the_same_commands() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ndemo:")[1].split("\n\n")[0]
    assert re.findall(r"-m srcfast (.*)", recipe) == list(COMMANDS)
    head = (ROOT / "srcfast/world/from_answers.yaml").read_text(encoding="utf-8").split("\nname:")[0]
    assert re.findall(r"^#     srcfast (.*?)(?: +#.*)?$", head, flags=re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_and_its_options_exist(words: str) -> None:
    command, settings, *options = shlex.split(words)
    known = {option for parameter in typer.main.get_command(app).commands[command].params for option in parameter.opts}  # type: ignore[attr-defined]
    assert {word for word in options if word.startswith("--")} <= known
    assert load_config(ROOT / settings, []).name == "demo"


def test_what_a_command_writes_is_what_the_next_one_reads() -> None:
    config = load_config(ROOT / "srcfast/world/from_answers.yaml", [])
    written = [words.partition("--output ")[2] for words in COMMANDS[:-1]]
    assert [config.rationale.teacher, config.scorer.path] == written[1:]
    assert f"--adapter {written[0]} " in COMMANDS[1]
    assert all(dataset.rationales == "none" for dataset in config.data.train), "the demo begins without rationales"


def test_the_pages_say_what_the_measurement_says() -> None:
    result = json.loads((ROOT / "benchmarks/results/demo.json").read_text(encoding="utf-8"))
    assert list(result["commands"]) == [f"srcfast {words}" for words in COMMANDS]
    took = f"{result['wall_seconds'] / 60:.1f} minutes and {result['peak_rss_bytes'] / 2**30:.1f} GiB"
    for page in ("README.md", "docs/results.md"):
        assert took in " ".join((ROOT / page).read_text(encoding="utf-8").split()), page
    results = " ".join((ROOT / "docs/results.md").read_text(encoding="utf-8").split())
    assert f"the gold answer on {result['taught']['taught']:,} of them" in results
    assert f"in {100 * result['r_scorer']['preference_accuracy']:.0f} % of held-out pairs" in results
