"""The comparison's commands exist with their options and settings; what it says of peers names the versions looked at."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from srcfast.cli.app import app
from srcfast.config.load import load_config

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# The section in which a command looks single settings up first, as its page says of `srcfast dpo ... beta=0.1`.
SECTIONS = {"rationale": "rationale", "dpo": "dpo"}
TABLES = re.findall(r"(?:^\|.*\|\n)+", PAGE, re.MULTILINE)
LAST_CELLS = [row.rstrip(" |\n").rpartition(" | ")[2] for table in TABLES for row in table.splitlines()[2:]]


def lines() -> list[list[str]]:
    return [shlex.split(cell.strip("`"))[1:] for cell in LAST_CELLS if cell.startswith("`srcfast ")]


def test_each_row_ends_with_a_command_or_a_page() -> None:
    assert len(TABLES) == 2 and len(LAST_CELLS) > 20
    assert [cell for cell in LAST_CELLS if not cell.startswith("`srcfast ")] == ["[by vLLM or SGLang](serving.md)"]


@pytest.mark.parametrize("words", lines(), ids=" ".join)
def test_its_commands_options_and_settings_exist(words: list[str]) -> None:
    name, *rest = words
    parameters = COMMANDS[name].params
    known = {option for parameter in parameters for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= known
    settings = [word for word in rest if re.match(r"[a-z_.]+=", word)]
    load_config(None, [*settings, *data()], section=SECTIONS.get(name))


def data() -> list[str]:
    return ["data.train=[{name: a, format: world, split: train, limit: 4}]"]


@pytest.mark.parametrize("name", sorted({words[0] for words in lines()}))
def test_its_commands_show_help(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output


def test_a_setting_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(Exception, match="betta"):
        load_config(None, ["betta=0.1", *data()], section="dpo")


def test_it_names_the_versions_of_those_that_were_looked_at() -> None:
    for peer in ("TRL 1.16.0", "LLaMA-Factory 0.9.5", "ms-swift 4.6.0", "Unsloth 2026.10.9"):
        assert peer in PAGE
