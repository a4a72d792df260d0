"""Write a run's results: `summary.json`, `gallery.json` and the page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from srcfast.data.jsonl import write_json, write_shards
from srcfast.data.records import Preference
from srcfast.report.gallery import image_names
from srcfast.report.page import write_report
from srcfast.report.summary import gallery_of, summary_of
from srcfast.stages.calibration_run import CalibrationRun
from srcfast.stages.headroom import with_next


def write_preferences(run: CalibrationRun, iteration: int, pairs: Sequence[Preference]) -> None:
    """Write a round's pairs, and replace `gallery.json` by some of them."""
    write_shards(run.artifacts.shards(iteration, "preferences"), (pair.to_json() for pair in pairs))
    candidates, scores = run.artifacts.candidates(iteration), run.artifacts.scores(iteration)
    names = partial(image_names, run=run.directory.path, output=Path(run.config.output))
    gallery = gallery_of(iteration, pairs, run.samples, candidates, scores, names)
    write_json(run.directory.path / "gallery.json", gallery)


def write_summary(run: CalibrationRun) -> None:
    """Write `summary.json` from the manifest, with the share of the headroom that the next model recovers, and the page."""
    manifest, headroom = run.directory.manifest(), []
    samples_of = {(dataset.name, dataset.split): samples for dataset, samples in run.headroom_sets()}
    entries = [e for name, stage in manifest.items() if name.endswith("/headroom") for e in stage["entries"]]
    for entry in entries:
        name, split = entry["dataset"], entry["split"]
        after = run.artifacts.aligned(f"iteration-{entry['iteration']}", name, split, samples_of[name, split])
        headroom.append(with_next(entry, after))
    write_json(run.directory.summary_file, summary_of(manifest, headroom, run.num_rejected))
    write_report(run.directory.path)
