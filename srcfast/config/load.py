"""Read settings from YAML files, presets and `key=value` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from srcfast.config.datasets import DatasetConfig
from srcfast.config.section import Section
from srcfast.config.settings import Config, Preset
from srcfast.config.yaml import note_lines, parse_yaml, read_yaml
from srcfast.errors import ConfigError, shorten

PRESETS = Path(__file__).parent / "presets"


def load_config(path: str | Path | None, overrides: Sequence[str] = (), section: str | None = None) -> Config:
    """Read settings from a YAML file; `key=value` overrides win over the file, and the file over its preset.

    Args:
        path: YAML file, or None for the defaults alone.
        overrides: dotted keys with YAML values: `dpo.beta=0.2`, `lora={r: 8, alpha: 16}`.
        section: a stage's section; an override's key is looked up in it first, then from the root.

    Raises:
        ConfigError: an unknown setting (the error names the nearest known one), one that the file sets twice, a value of the
            wrong type or out of bounds, or text that is not YAML; with file and line.

    Of two overrides of one setting the last wins.
    """
    return load_with_sources(path, overrides, section)[0]


def load_with_sources(
    path: str | Path | None, overrides: Sequence[str] = (), section: str | None = None
) -> tuple[Config, dict[str, str]]:
    """Read settings as `load_config` does, and return where each one was set.

    Returns:
        The settings, and by dotted key the preset, the file and line, or the override that set it. Defaults have no entry.
    """
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if path is not None:
        tree = read_yaml(Path(path), sources)
    for word in overrides:
        key, value = _read_override(word, section)
        sources.update(dict.fromkeys([key, *_dotted_keys(value, key)], f"override {word!r}"))
        _assign(tree, key.split("."), value, word)
    config, preset = _validated(tree, sources)
    preset_keys = [key for name in preset for key in (name, *_dotted_keys(preset[name], name))]
    return config, dict.fromkeys(preset_keys, f"preset {config.preset}") | sources


def config_of(trees: Sequence[Mapping[str, Any]], sources: Mapping[str, str]) -> Config:
    """Return the settings of several trees, of which a later one wins over those before it.

    Args:
        trees: sections with their settings, as a YAML file has them.
        sources: by dotted key where a setting stands, for errors.

    Raises:
        ConfigError: as `load_config`.
    """
    tree: dict[str, Any] = {}
    for each in trees:
        tree = _merge(tree, dict(each))
    return _validated(tree, sources)[0]


def _validated(tree: dict[str, Any], sources: Mapping[str, str]) -> tuple[Config, dict[str, Any]]:
    """Return the settings of a tree over those of the preset that it names, and the preset's tree."""
    preset = _read_preset(tree)
    try:
        return Config.model_validate(_merge(preset, tree)), preset
    except ValidationError as error:
        texts = [_explain(entry, sources) for entry in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(texts))) from None


def known_settings(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Return the definitions of all settings by dotted name, each section before its settings."""
    settings = {}
    for name, field in model.model_fields.items():
        settings[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            settings |= known_settings(field.annotation, f"{prefix}{name}.")
    return settings


# Presets and overrides --------------------------------------------------------------------------------------


def _read_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """Read the preset that the settings name. Returns {} for none, and for an unknown one, which validation then reports."""
    name = tree.get("preset")
    return read_yaml(PRESETS / f"{name}.yaml", {}) if name in get_args(Preset) else {}


def _merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """Merge two trees of settings, section by section; where both set a value, `overlay` wins."""
    merged = dict(base)
    for key, value in overlay.items():
        base_value = merged.get(key)
        if isinstance(base_value, dict) and value is None:
            continue  # a heading with nothing under it sets nothing
        if isinstance(base_value, dict) and isinstance(value, dict):
            value = _merge(base_value, value)
        merged[key] = value
    return merged


def _read_override(word: str, section: str | None) -> tuple[str, Any]:
    """Parse `key=value` into the full dotted key and the value."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"{word!r}: expected key=value, found no '='")
    known = known_settings()
    if section is not None and f"{section}.{key}" in known:
        key = f"{section}.{key}"
    elif key.startswith(("data.train.", "data.evaluation.")):
        whole = ".".join(key.split(".")[:2])
        raise ConfigError(f"override {word!r}: expected {whole} as a whole list, found a part of one")
    elif key not in known:
        raise ConfigError(f"override {word!r}: {_describe_unknown(key, section)}")
    return key, parse_yaml(text, f"override {word!r}", lambda node: note_lines(node, f"{key}.", Path(word), {}))


def _assign(tree: dict[str, Any], keys: Sequence[str], value: Any, word: str) -> None:
    """Set a value within nested mappings; merge a mapping into the mapping that is already there."""
    for key in keys[:-1]:
        if tree.get(key) is None:  # not set, or a heading with nothing under it
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise ConfigError(f"override {word!r}: expected {key} to be a section, found {tree!r}")
    last, present = keys[-1], tree.get(keys[-1])
    tree[last] = _merge(present, value) if isinstance(present, dict) and isinstance(value, dict) else value


def _dotted_keys(value: Any, prefix: str) -> list[str]:
    """List the dotted keys of everything below a value, at any depth; list entries count from 0."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    keys = []
    for key, inner in pairs:
        keys += [f"{prefix}.{key}", *_dotted_keys(inner, f"{prefix}.{key}")]
    return keys


# Errors -----------------------------------------------------------------------------------------------------


def _describe_unknown(key: str, section: str | None = None) -> str:
    """Say that a setting is unknown, and name the known one whose dotted key, or last part, is most similar."""
    known = list(known_settings())
    parent = key.rpartition(".")[0]
    is_dataset = parent.startswith(("data.train.", "data.evaluation."))
    if is_dataset:
        known = [f"{parent}.{name}" for name in DatasetConfig.model_fields]
    readings = [key] if section is None else [f"{section}.{key}", key]
    scored = [
        (difflib.SequenceMatcher(None, reading, name).ratio(), -index, name)
        for index, reading in enumerate(readings)
        for name in known
    ]
    last = key.rpartition(".")[2]
    if not is_dataset:
        # A setting under the wrong section: the same last part counts nearly as much as the same name.
        tails = [(difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio(), name) for name in known]
        scored += [(0.95 * ratio, -len(readings), name) for ratio, name in tails]
    return f"unknown setting {key!r}; the nearest known one is {max(scored)[2]!r}"


def _explain(error: Any, sources: Mapping[str, str]) -> str:
    """Turn one of pydantic's validation errors into text: source, setting, expected and found value."""
    location = [str(part) for part in error["loc"]]
    known, dotted = known_settings(), ".".join(location)
    while location and dotted not in sources and dotted not in known:  # pydantic appends the union's branch
        location.pop()
        dotted = ".".join(location)
    ancestors = [
        ".".join(location[:n]) for n in range(len(location), 0, -1)
    ]  # the setting, then the sections around it
    source = next((sources[key] for key in ancestors if key in sources), None)
    where = f"{source}: " if source else ""
    if error["type"] == "extra_forbidden":
        return where + _describe_unknown(dotted)
    if error["type"] == "invalid_key":
        return f"{where}{dotted + ': ' if dotted else ''}expected the name of a setting, found {error['input']!r}"
    if error["type"] == "missing":
        return f"{where}{'.'.join(str(part) for part in error['loc'])}: expected a value, found none"
    if error["type"] == "value_error":
        return f"{where}{dotted + ': ' if dotted else ''}{error['ctx']['error']}"
    field = _find_field(dotted)
    bounds = "" if field is None else _describe_bounds(field)
    expected = error["msg"].removeprefix("Input should be ")
    if error["type"] == "model_type":
        expected = "a group of settings (key: value)"
    if bounds and field is not None:
        expected = f"{'a whole number' if field.annotation is int else 'a number'} {bounds}"
    fix = ". Fix: quote it" if error["type"] == "string_type" else ""
    return f"{where}{dotted}: expected {expected}, found {shorten(repr(error['input']))}{fix}"


def _find_field(dotted: str) -> FieldInfo | None:
    """Look up the definition of a setting; for `data.train.0.limit` that of a dataset's `limit`. None: no such setting."""
    parts = dotted.split(".")
    if parts[:2] in (["data", "train"], ["data", "evaluation"]) and len(parts) == 4:
        return DatasetConfig.model_fields.get(parts[3])
    return known_settings().get(dotted)


def _describe_bounds(field: FieldInfo) -> str:
    """Write a setting's bounds as `> 0 and <= 1`; empty for a setting without bounds."""
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    return " and ".join(
        f"{sign} {value}"
        for limit in field.metadata
        for attribute, sign in signs
        if (value := getattr(limit, attribute, None)) is not None
    )
