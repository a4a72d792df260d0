"""The rows of a run's `metrics.jsonl`: the manifest records how many each training wrote, and their hash."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import json_hash, read_lines
from srcfast.errors import InputError


def check_metrics(file: Path, stage: str, entry: Mapping[str, Any]) -> None:
    """Warn where the rows of a finished training are no longer those that it wrote: no result depends on them, but curves do."""
    recorded = entry.get("metrics")  # runs of older releases have none
    if recorded is not None and recorded != (metrics := metrics_of(file, stage)):
        rows = recorded.get("rows", "recorded") if isinstance(recorded, dict) else "recorded"  # of a foreign manifest
        found = f"{metrics['rows']} rows" + (", others" if metrics["rows"] == rows else "")
        warnings.warn(
            f"{file}: expected the {rows} rows that stage {stage!r} wrote, found {found}; its curves are incomplete. "
            f"Fix: {way_out(stage)}",
            RuntimeWarning,
            stacklevel=2,
        )


def metrics_of(file: Path, stage: str) -> dict[str, Any]:
    """Count and hash the rows of a stage in `metrics.jsonl`."""
    lines = read_lines(file) if file.is_file() else ()
    rows = [row for _, row in lines if not isinstance(row, InputError) and row.get("stage") == stage]
    return {"rows": len(rows), "sha256": json_hash(rows)}


def way_out(stage: str) -> str:
    """Return the fix of an error about what a finished stage wrote."""
    return f"put it back as it was, or remove {stage!r} and what comes after it from manifest.json: that is done again"
