"""YAML as settings are written in it: plain values alone, no key twice, and no more of them by aliases than anyone means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from srcfast.data.jsonl import regular
from srcfast.errors import ConfigError

MAX_NODES = 10_000  # values that the aliases of a file stand for beside those that are written


def read_yaml(path: Path, places: dict[str, str]) -> dict[str, Any]:
    """The mapping in a YAML file, {} if it is empty; `places` takes the line of every key.

    Raises:
        ConfigError: no such file, no YAML, no mapping, or a key that is there twice.
    """
    try:
        text = regular(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise ConfigError(f"{path}: expected a readable YAML file, found {error}") from error
    tree = parse_yaml(text, str(path), lambda node: note_lines(node, "", path, places))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected settings `key: value`, found {type(tree).__name__}")
    return tree


def parse_yaml(text: str, where: str, look: Callable[[Any], None]) -> Any:
    """The value of a YAML text; `look` sees its nodes first.

    Raises:
        ConfigError: no YAML, a tag that is no plain value's, or aliases that swell to more than any settings have.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _swells(node):
            raise ConfigError(
                f"{where}: expected at most {MAX_NODES:,} values by aliases, found more. Mend: leave aliases out"
            )
        look(node)
        return yaml.safe_load(text)
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{where}: expected settings, found YAML that is nested too deep, or holds itself") from error
    except Exception as error:  # PyYAML lets through what a value's parser raises: ValueError for 2001-99-99, ...
        found = str(error) if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{where}: expected YAML, found {found}") from error


def _swells(node: Any) -> bool:
    """Whether aliases add more than MAX_NODES to the nodes that are written, each counted as all that it stands for."""
    left, written, added = [node], set(), 0
    while left and added <= MAX_NODES:
        one = left.pop()
        added += id(one) in written  # an alias is the very node that it stands for
        written.add(id(one))
        if isinstance(one, yaml.MappingNode):
            left += (part for pair in one.value for part in pair)
        elif isinstance(one, yaml.SequenceNode):
            left += one.value
    return added > MAX_NODES


def note_lines(node: Any, prefix: str, path: Path, places: dict[str, str]) -> None:
    """Note the line of every key; refuse one that is set twice (YAML would silently take the last)."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            place = f"{path}, line {key.start_mark.line + 1}"
            if name in places:
                raise ConfigError(f"{place}: {name} is set twice, first at {places[name]}. Mend: keep one")
            places[name] = place
            note_lines(value, f"{name}.", path, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            places[f"{prefix}{index}"] = f"{path}, line {value.start_mark.line + 1}"
            note_lines(value, f"{prefix}{index}.", path, places)
