"""Read and write YAML of settings: YAML 1.2's plain values alone, no key twice, a bounded number of values by aliases."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from srcfast.data.jsonl import regular
from srcfast.errors import ConfigError

MAX_NODES = 10_000  # values that a file's aliases may add to those that are written out
# Tags of plain scalars by YAML 1.2's core schema, and `<<`: pattern and first characters. PyYAML's are of YAML 1.1, which reads
# 010 as 8, 1:30 as 90, `no` as false, 1e-5 as text, and 2001-01-01 as a date.
_CORE_SCHEMA = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes a text that either version of YAML reads as something else."""


_BASES = {"0o": 8, "0x": 16}
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value, _BASES.get(node.value[:2], 10)))
_Loader.add_constructor(
    "tag:yaml.org,2002:float", lambda _, node: float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
)
for _tag, (_pattern, _first) in _CORE_SCHEMA.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def dump_yaml(value: Any, **options: Any) -> str:
    """Write plain values, so that `read_yaml` and other readers of YAML read them back; options are PyYAML's."""
    return yaml.dump(value, Dumper=_Dumper, allow_unicode=True, **options)


def read_yaml(path: Path, locations: dict[str, str]) -> dict[str, Any]:
    """Read the mapping in a YAML file, {} if it is empty, and add the file and line of every key to `locations`.

    Raises:
        ConfigError: the file is missing, is not YAML or not a mapping, or sets a key twice.
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


def parse_yaml(text: str, where: str, on_node: Callable[[yaml.Node | None], None]) -> Any:
    """Parse a YAML text; `on_node` is called with its root node before values are made.

    Raises:
        ConfigError: the text is not YAML, has a tag for something other than plain values, or more than MAX_NODES values by
            aliases.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if _aliases_exceed_limit(node):
            expected = f"expected at most {MAX_NODES:,} values by aliases"
            raise ConfigError(f"{where}: {expected}, found more. Fix: leave aliases out")
        on_node(node)
        return None if node is None else loader.construct_document(node)
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{where}: expected settings, found YAML that is nested too deep, or holds itself") from error
    except Exception as error:  # PyYAML lets through what a value's parser raises: ValueError for 2001-99-99, ...
        reason = str(error) if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{where}: expected YAML, found {reason}") from error


def _aliases_exceed_limit(root: yaml.Node | None) -> bool:
    """Return whether aliases add more than MAX_NODES nodes; an alias counts as every node that it stands for."""
    pending, written, added = [root], set(), 0
    while pending and added <= MAX_NODES:
        node = pending.pop()
        added += id(node) in written  # PyYAML returns the same node object for an alias
        written.add(id(node))
        if isinstance(node, yaml.MappingNode):
            pending += (part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value
    return added > MAX_NODES


def note_lines(node: yaml.Node | None, prefix: str, path: Path, locations: dict[str, str]) -> None:
    """Add the file and line of every key to `locations`.

    Raises:
        ConfigError: a key is set twice, of which YAML would silently use the last.
    """
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
