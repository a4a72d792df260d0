"""Every number of the settings and of the command line has a lower and an upper bound, found by introspection."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from srcfast.cli.app import app
from srcfast.config.datasets import DatasetConfig
from srcfast.config.load import load_config
from srcfast.config.settings import Config
from srcfast.errors import ConfigError
from srcfast.training.profiler import parse_steps
from srcfast.units import parse_bytes

BEYOND = (10**18, 10**30, -1, -(10**30), "1e300", "-1e300", ".inf", "-.inf", ".nan")


def numbers(annotation: Any) -> bool:
    """Whether a field takes a number, alone or among others."""
    parts = get_args(annotation) if get_origin(annotation) is not None else ()
    return annotation in (int, float) or any(numbers(part) for part in parts)


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        elif numbers(field.annotation):
            yield prefix + name


def word(name: str, value: Any) -> str:
    section, _, last = name.rpartition(".")
    if section == "dataset":
        return f"data.train=[{{name: a, format: world, limit: 3, {last}: {value}}}]".replace("limit: 3, limit", "limit")
    return f"{name}={value}"


NUMBERS = [*fields(Config), *fields(DatasetConfig, "dataset.")]


def test_the_numbers_are_all_there() -> None:
    assert len(NUMBERS) > 60 and {"dpo.epochs", "threads", "max_rejected", "dataset.seed"} <= {*NUMBERS}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_setting_beyond_all_sense_is_refused_by_name(name: str) -> None:
    for value in BEYOND:
        if value == 10**18 and name == "dataset.seed" or value in (10**18, 10**30) and name == "dpo.beta":
            continue  # seeds have 63 bits; any beta that float32 holds overflows by name, and is replayed
        with pytest.raises(ConfigError, match=name.rpartition(".")[2]):
            load_config(None, [word(name, value)])


def options() -> Iterator[tuple[str, str]]:
    """Each command and option of the command line's numbers."""
    for command in app.registered_commands:
        assert command.callback is not None
        hints = get_type_hints(command.callback, include_extras=True)
        for name, parameter in signature(command.callback).parameters.items():
            annotation = hints[name] if isinstance(parameter.annotation, str) else parameter.annotation
            if numbers(annotation):
                yield command.name or command.callback.__name__, f"--{name.replace('_', '-')}"


def test_an_option_beyond_all_sense_is_refused_by_name() -> None:
    found = list(options())
    assert len(found) >= 7
    for command, option in found:
        for value in (10**20, -1, "1e400", "nan"):
            result = CliRunner().invoke(app, [command, option, str(value)])
            assert result.exit_code == 2 and option in result.output, (command, option, value, result.output)


@pytest.mark.parametrize("text", ["3:1000000000000", "0:0", "5:4", "-1:3", "1:" + "9" * 400])
def test_profiled_steps_are_bounded(text: str) -> None:
    with pytest.raises(ConfigError, match="--profile"):
        parse_steps(text)


@pytest.mark.parametrize("text", ["1025TiB", "999999999999999999T", "0", "0.5B"])
def test_sizes_are_bounded(text: str) -> None:
    with pytest.raises(ConfigError, match="memory"):
        parse_bytes(text, "memory")
