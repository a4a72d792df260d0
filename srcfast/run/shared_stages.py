"""Take over the finished stages that two runs have in common: settings, inputs and earlier stages are the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import as_json, naming, read_lines, write_json, write_jsonl
from srcfast.errors import InputError
from srcfast.run.directory import SINGLE_SETTINGS, RunDirectory, iteration_of, settings_of

LEAVES = ("evaluation", "headroom")  # stages on which no other one depends


def common_stages(source: RunDirectory, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of the finished stages of a run that another one would repeat.

    Args:
        source: of the run that has finished stages.
        settings: of the other run, by section (`Config.identity`).
    """
    entries, wanted = {}, as_json(settings)
    for name, entry in source.manifest().items():
        kind = name.rpartition("/")[2]
        names = {*entry["settings"], *SINGLE_SETTINGS.get(kind, ())}
        same = settings_of(wanted, names) == {section: entry["settings"].get(section) for section in names}
        if same and iteration_of(name) <= wanted["iterations"]:
            entries[name] = entry
        elif kind not in LEAVES:
            break  # what comes later depends on it
    return entries


def share_stages(source: RunDirectory, target: RunDirectory, settings: Mapping[str, Any]) -> list[str]:
    """List another run's stages in a run's manifest, and link their files; return the names of the stages.

    Files are linked where the file system can do so, since a stage's files are replaced and never changed; otherwise copied.
    Stages that the run has already stay as they are.

    Raises:
        InputError: a file of these stages has changed.
    """
    entries = target.manifest()
    shared = {name: entry for name, entry in common_stages(source, settings).items() if name not in entries}
    for name, entry in shared.items():
        source.check_files(name, entry)
        for file in entry["files"]:
            _link(source.path / file, target.path / file)
    if shared and source.metrics_file.is_file():
        rows = [row for row in _rows(target.metrics_file) if row.get("stage") not in shared]  # of a stopped attempt
        rows += [row for row in _rows(source.metrics_file) if row.get("stage") in shared]
        write_jsonl(target.metrics_file, rows)
    if shared:
        write_json(target.manifest_file, entries | shared)
    return list(shared)


def _rows(file: Path) -> list[dict[str, Any]]:
    """Read the complete rows of a run's metrics, to which its process may be adding one."""
    lines = read_lines(file) if file.is_file() else ()
    return [row for _, row in lines if not isinstance(row, InputError)]


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it."""
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)
