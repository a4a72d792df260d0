"""Refuse what a checkpoint's files could make transformers fetch from a hub, or import and run.

srcfast passes `trust_remote_code=False` everywhere, which keeps `auto_map` from being followed. What is below works without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from srcfast.errors import InputError

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
EXPERTS = ("eager", "batched_mm", "grouped_mm")


def _is_off(value: Any) -> bool:
    return not value


def _is_one_of(names: tuple[str, ...]) -> Callable[[Any], bool]:
    """Return whether a value, or each section's of it, is one of these names or none."""

    def fits(value: Any) -> bool:
        return all(one is None or one in names for one in (value.values() if isinstance(value, dict) else [value]))

    return fits


def _is_local_name(value: Any) -> bool:
    return not isinstance(value, str) or not {*"/:"} & {*value}


# By field, at any depth of a config: the values that reach nothing outside of the directory and of transformers.
BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "_attn_implementation": (
        _is_one_of(ATTENTION),
        f"one of {', '.join(ATTENTION)}: others are repositories of kernels",
    ),
    "attn_implementation": (
        _is_one_of(ATTENTION),
        f"one of {', '.join(ATTENTION)}: others are repositories of kernels",
    ),
    "_attn_implementation_internal": (_is_one_of(ATTENTION), f"one of {', '.join(ATTENTION)}"),
    "_experts_implementation": (_is_one_of(EXPERTS), f"one of {', '.join(EXPERTS)}: others are fetched"),
    "experts_implementation": (_is_one_of(EXPERTS), f"one of {', '.join(EXPERTS)}: others are fetched"),
    "use_kernels": (_is_off, "false: kernels are fetched from a hub"),
    "kernel_config": (_is_off, "none: kernels are fetched from a hub"),
    "use_pretrained_backbone": (_is_off, "false: weights are fetched from a hub"),
    "backbone": (_is_local_name, "a name of timm, none of a hub"),
    "architecture": (_is_local_name, "a name of timm, none of a hub"),
    "custom_generate": (_is_off, "none: it is code of a hub"),
}


def refuse_foreign_code(settings: dict[str, Any], file: Path) -> None:
    """Raise InputError where a config's settings would make transformers fetch or import something."""
    for name, key, value in _fields(settings, ""):
        fits, expected = BOUNDS[key]
        if not fits(value):
            fix = "remove the field, if you trust the rest of the checkpoint"
            raise InputError(file=file, field=name, expected=expected, found=repr(value)[:200], fix=fix)


def _fields(settings: Any, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (name with its sections, key, value) of the fields that have bounds, at any depth."""
    if isinstance(settings, list):
        for number, value in enumerate(settings):
            yield from _fields(value, f"{prefix}{number}.")
    elif isinstance(settings, dict):
        for key, value in settings.items():
            if key in BOUNDS:
                yield prefix + key, key, value
            else:
                yield from _fields(value, f"{prefix}{key}.")
