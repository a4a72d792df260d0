"""Plain values are YAML 1.2's; long plain files are read, what a few lines swell to by aliases is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from srcfast.config.load import load_config
from srcfast.config.yaml import MAX_NODES, dump_yaml, parse_yaml, read_yaml
from srcfast.errors import ConfigError


def test_a_vocabulary_of_many_words_is_read(tmp_path: Path) -> None:
    words = [f"word {number}" for number in range(MAX_NODES + 1)]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"words": words}))
    assert read_yaml(tmp_path / "a.yaml", {}) == {"words": words}


@pytest.mark.parametrize("plain", [0, MAX_NODES])
def test_what_aliases_add_is_bounded_however_long_the_file(tmp_path: Path, plain: int) -> None:
    lines = ["plain:", *(f"- {number}" for number in range(plain)), "a: &a [x, x, x, x, x, x, x, x, x]"]
    once = 10  # the list and its nine items
    most = MAX_NODES // once
    for count in (most, most + 1):
        (tmp_path / "a.yaml").write_text("\n".join([*lines, "b:", *["- *a"] * count]))
        if count == most:
            assert read_yaml(tmp_path / "a.yaml", {})["b"] == [["x"] * 9] * most
        else:
            with pytest.raises(ConfigError, match="Fix: leave aliases out"):
                read_yaml(tmp_path / "a.yaml", {})


# By YAML 1.2's core schema (chapter 10.3 of its specification); what YAML 1.1 reads is in the comment where it differs.
SCALARS = {
    "010": 10,  # 8
    "08": 8,  # text
    "-010": -10,  # -8
    "+3": 3,
    "0x1F": 31,
    "0o17": 15,  # text
    "0b11": "0b11",  # 3
    "1_000": "1_000",  # 1000
    "1:30": "1:30",  # 90
    "1:30.5": "1:30.5",  # 90.5
    "1e-5": 1e-5,  # text
    "1e3": 1000.0,  # text
    ".5": 0.5,
    "2.": 2.0,
    "yes": "yes",  # true
    "No": "No",  # false
    "on": "on",  # true
    "OFF": "OFF",  # false
    "y": "y",
    "True": True,
    "false": False,
    "2001-01-01": "2001-01-01",  # a date
    "~": None,
    "Null": None,
    "=": "=",
    "12GiB": "12GiB",
    ".inf": float("inf"),
    "-.INF": -float("inf"),
    "!!int 010": 10,
    "!!float 1": 1.0,
}


@pytest.mark.parametrize("text", SCALARS)
def test_plain_values_are_those_of_yaml_1_2_in_files_and_on_the_command_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(f"value: {text}\nlist: [{text}, x]\n")
    tree = read_yaml(tmp_path / "a.yaml", {})
    value = SCALARS[text]
    assert [tree["value"], tree["list"]] == [value, [value, "x"]] and type(tree["value"]) is type(value)
    word = parse_yaml(text, "word", lambda node: None)
    assert word == value and type(word) is type(value)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("iterations: 010", ("iterations", 10)),
        ("iterations: 1_0", ("iterations", 10)),
        ("seed: 0x10", ("seed", 16)),
        ("quiet: yes", ("quiet", True)),
        ("quiet: off", ("quiet", False)),
        ("name: no", ("name", "no")),
        ("name: 2001-01-01", ("name", "2001-01-01")),
    ],
)
def test_settings_are_what_their_scalars_say(tmp_path: Path, setting: str, expected: tuple[str, Any]) -> None:
    (tmp_path / "a.yaml").write_text(setting)
    name, value = expected
    assert getattr(load_config(tmp_path / "a.yaml"), name) == value
    assert getattr(load_config(None, [setting.replace(": ", "=")]), name) == value


@pytest.mark.parametrize("setting", ["threads: 1:30", "seed: 2001-01-01", "seed: 0b11", "name: 010", "name: 1e5"])
def test_a_scalar_of_another_type_than_its_setting_s_is_refused_by_line(tmp_path: Path, setting: str) -> None:
    (tmp_path / "a.yaml").write_text(f"quiet: true\n{setting}\n")
    name, kind = setting.partition(":")[0], "a valid string.*Fix: quote it" if setting[0] == "n" else "a whole number"
    with pytest.raises(ConfigError, match=rf"a\.yaml, line 2: {name}: expected {kind}"):
        load_config(tmp_path / "a.yaml")


def test_what_is_written_is_read_back_by_both_versions_of_yaml() -> None:
    values = [
        *SCALARS,
        *SCALARS.values(),
        "é",
        "",
        "# x",
        "a: b",
        1e-5,
        1e22,
        -7,
    ]
    text = dump_yaml(values)
    assert parse_yaml(text, "file", lambda node: None) == values
    assert yaml.safe_load(text) == values
