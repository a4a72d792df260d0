"""The README's example can be followed: its records are read, its settings load, its commands and their options exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from PIL import Image

from srcfast.cli.app import app
from srcfast.config.load import load_config
from srcfast.data.readers import read_samples

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INDEX = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app).commands


def block(language: str) -> str:
    [text] = [text for name, text in BLOCKS if name == language]
    return text


def lines_of_commands() -> list[list[str]]:
    """The words of each line that runs srcfast, from the command's name on; comments are left out."""
    lines = [line for name, text in BLOCKS if not name for line in text.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("srcfast") + 1 :] for line in words if "srcfast" in line]


def test_it_is_short_and_sets_up_by_two_commands():
    assert len(README.splitlines()) <= 150
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}: ", makefile, re.MULTILINE) for target in targets)


def test_its_records_are_read(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(block("jsonl"), encoding="utf-8")
    rows = [json.loads(line) for line in block("jsonl").splitlines()]
    (tmp_path / "images").mkdir()
    for row in rows:
        Image.new("RGB", (8, 8)).save(tmp_path / row["image"])
    rejected: list[dict] = []
    samples = read_samples(file, format="jsonl", image_root=tmp_path, rejected=rejected)
    assert [sample.id for sample in samples] == [row["id"] for row in rows] and rejected == []


@pytest.mark.parametrize("words", lines_of_commands(), ids=lambda words: " ".join(words)[:60])
def test_its_commands_their_options_and_settings_exist(words, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(block("yaml"), encoding="utf-8")
    command = COMMANDS[words[0]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    settings = [word for word in words[1:] if re.match(r"[a-z_.]+=", word)]
    assert load_config(file, settings, section=words[0] if words[0] == "dpo" else None).name == "street"


def test_it_runs_the_commands_that_it_explains():
    assert {words[0] for words in lines_of_commands()} >= {"scorer", "inspect", "estimate", "calibrate", "dpo", "world"}


def test_the_index_names_every_command():
    [table] = re.findall(r"^## Commands\n(.*?)^## ", INDEX, re.MULTILINE | re.DOTALL)
    first_cells = " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", first_cells)) == set(COMMANDS)
