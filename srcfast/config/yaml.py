"""YAML of settings: plain values alone, no key twice, and a bounded number of values by aliases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from srcfast.data.jsonl import regular
from srcfast.errors import ConfigError

MAX_NODES = 10_000  # values that the aliases of a file stand for beside those that are written


def read_yaml(path: Path, locations: dict[str, str]) -> dict[str, Any]:
    """Read the mapping in a YAML file, {} if it is empty; the file and line of every key are noted in `locations`.

    Raises:
        ConfigError: no such file, no YAML, no mapping, or a key that is there twice.
    """
    try:
        text = regular(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise ConfigError(f"{path}: expected a readable YAML file, found {error}") from error
    tree = parse_yaml(text, str(path), lambda node: note_lines(node, "", path, locations))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected settings `key: value`, found {type(tree).__name__}")
    return tree


def parse_yaml(text: str, where: str, look: Callable[[yaml.Node | None], None]) -> Any:
    """Parse a YAML text; `look` sees its nodes first.

    Raises:
        ConfigError: no YAML, a tag that is no plain value's, or more than MAX_NODES values by aliases.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _swells(node):
            expected = f"expected at most {MAX_NODES:,} values by aliases"
            raise ConfigError(f"{where}: {expected}, found more. Fix: leave aliases out")
        look(node)
        return yaml.safe_load(text)
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{where}: expected settings, found YAML that is nested too deep, or holds itself") from error
    except Exception as error:  # PyYAML lets through what a value's parser raises: ValueError for 2001-99-99, ...
        found = str(error) if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{where}: expected YAML, found {found}") from error


def _swells(root: yaml.Node | None) -> bool:
    """Return whether aliases add more than MAX_NODES to the nodes that are written, each counted as all that it stands for."""
    pending, written, added = [root], set(), 0
    while pending and added <= MAX_NODES:
        node = pending.pop()
        added += id(node) in written  # an alias is the very node that it stands for
        written.add(id(node))
        if isinstance(node, yaml.MappingNode):
            pending += (part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value
    return added > MAX_NODES


def note_lines(node: yaml.Node | None, prefix: str, path: Path, locations: dict[str, str]) -> None:
    """Note the file and line of every key. Raises ConfigError at one that is set twice: YAML would silently take the last."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            location = f"{path}, line {key.start_mark.line + 1}"
            if name in locations:
                raise ConfigError(f"{location}: {name} is set twice, first at {locations[name]}. Fix: keep one")
            locations[name] = location
            note_lines(value, f"{name}.", path, locations)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            locations[f"{prefix}{index}"] = f"{path}, line {value.start_mark.line + 1}"
            note_lines(value, f"{prefix}{index}.", path, locations)
