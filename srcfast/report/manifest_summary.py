"""Build a run's summary from the manifest of its finished stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def summary_of(manifest: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what `summary.json` says of these stages; the count of rejected records, which no stage has, is None.

    Args:
        manifest: the entries of the finished stages by name, in the order in which they finished.
    """
    summary = {
        "evaluations": _entries(manifest, "evaluation"),
        "headroom": _entries(manifest, "headroom"),
        "funnel": _of_stages(manifest, "preferences", "funnel"),
        "diversity": _of_stages(manifest, "candidates", "diversity"),
        "adaptive": _where_present(manifest, "adaptive"),
        "rejected": None,
        "stages": [
            {
                "name": name,
                "seconds": stage["seconds"],
                "tokens_per_second": stage["tokens"] / max(stage["seconds"], 1e-9),
                "memory": stage.get("memory"),
            }
            for name, stage in manifest.items()
        ],
        "peak_rss_bytes": max((stage["peak_rss_bytes"] for stage in manifest.values()), default=None),
        "seconds": sum(stage["seconds"] for stage in manifest.values()),
    }
    if calibration := _where_present(manifest, "calibration"):
        summary["calibration"] = calibration
    return summary


def _of_stages(manifest: Mapping[str, Mapping[str, Any]], kind: str, key: str) -> dict[str, Any]:
    """Return a value of all stages of a kind, by what their names have before it: iteration-1/dpo -> iteration-1."""
    suffix = f"/{kind}"
    return {
        name.removesuffix(suffix): stage[key]
        for name, stage in manifest.items()
        if name.endswith(suffix) and key in stage
    }


def _where_present(manifest: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Return a value of the stages that have it, by what their names have before the kind."""
    return {name.partition("/")[0]: stage[key] for name, stage in manifest.items() if key in stage}


def _entries(manifest: Mapping[str, Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the entries, one per dataset, of all stages of a kind."""
    return [entry for entries in _of_stages(manifest, kind, "entries").values() for entry in entries]
