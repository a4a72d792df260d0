"""Settings as text: a config file with where each value came from, and the JSON schema of config files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from srcfast.config.settings import Config
from srcfast.config.yaml import dump_yaml


def annotated_yaml(config: Config, sources: Mapping[str, str]) -> str:
    """Return the settings as a config file that `load_config` reads, each with its source as a comment.

    Args:
        config: settings.
        sources: dotted key -> where it was set, see `load_with_sources`; a key without an entry is a default.
    """
    lines = list(_lines(config.model_dump(mode="json"), sources))
    width = min(60, max(len(text) for text, source in lines if source))
    return "".join(f"{text:{width}}  # {source}\n" if source else f"{text}\n" for text, source in lines)


def _lines(values: Mapping[str, Any], sources: Mapping[str, str], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (line, source); the source of a section's heading is empty."""
    indent = "  " * prefix.count(".")
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            yield f"{indent}{key}:", ""
            yield from _lines(value, sources, f"{dotted}.")
        else:
            text = dump_yaml(value, default_flow_style=True, width=10**9)
            yield f"{indent}{key}: {text.removesuffix('...' + chr(10)).strip()}", sources.get(dotted, "default")


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of config files, for editors: names, types, bounds, defaults and descriptions."""
    schema = Config.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        for field in section["properties"].values():
            if "description" in field:  # a docstring, with line breaks; a section has none
                field["description"] = " ".join(field["description"].split())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "srcfast config"}
