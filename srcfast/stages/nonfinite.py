"""A batch whose loss or gradient was not finite, on disk with the weights before its step: see `replay`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from srcfast import distributed
from srcfast.config.settings import Config, TrainingConfig
from srcfast.data.batching import global_batch
from srcfast.data.jsonl import write_json
from srcfast.data.records import Preference, Sample
from srcfast.errors import SrcfastError
from srcfast.models.lora import lora_parameters, save_adapter
from srcfast.models.scorer import Scorer
from srcfast.models.text_model import save_text_model
from srcfast.training.checkpoint import weights_hash
from srcfast.training.items import NotFinite

DIRECTORY, BATCH = "not-finite", "batch.json"


@contextmanager
def dump_nonfinite_batch(
    stage: str,
    config: Config,
    model: Any,
    records: Sequence[Any],
    loop: TrainingConfig,
    directory: Path,
) -> Iterator[None]:
    """Store the batch if a loss or gradient is not finite while the body trains `model` on items made of these records.

    Args:
        stage: "rationale", "dpo" or "scorer".
        config: the run's.
        model: with an adapter; or the R-Scorer.
        records: one an item, in their order: preferences, samples with their responses, or the R-Scorer's examples.
        loop: the training's settings.
        directory: in which `not-finite/` is made.

    Raises:
        SrcfastError: a loss or gradient was not finite; the message names the command that runs the batch again.
    """
    try:
        yield
    except NotFinite as error:
        place, step, text = directory / DIRECTORY, error.step, str(error)
        batch = [records[index] for index in global_batch(len(records), step, loop)]
        distributed.run_on_rank_zero(lambda: _write(place, stage, config, model, batch, loop, step, text))
        raise SrcfastError(f"{text}. The batch is kept; to run it again: {_command(place)}") from error


def _write(
    place: Path,
    stage: str,
    config: Config,
    model: Any,
    batch: Sequence[Any],
    loop: TrainingConfig,
    step: int,
    error: str,
) -> None:
    pairs = [record for record in batch if isinstance(record, Preference)]
    raps = [record for record in batch if isinstance(record, tuple)]
    examples = [record for record in batch if not isinstance(record, tuple | Preference)]
    kinds = [isinstance(record, Preference) for record in batch]
    owners: list[Preference | Sample] = [*pairs, *(sample for sample, _ in raps)]
    # Examples of the R-Scorer have no images.
    root = Path(os.path.commonpath([owner.image_root.resolve() for owner in owners] or [Path.cwd()]))
    kept = {
        "stage": stage,
        "step": step,
        "error": error,
        "weights_sha256": trained_hash(model),
        "command": _command(place),
        "loop": loop.loop(),
        "config": config.model_dump(mode="json"),
        "image_root": str(root),
        # Of the records below, in the batch: what dropout drops of a tree depends on it.
        "places": sorted(range(len(batch)), key=lambda number: not kinds[number]),
        "preferences": [replace(pair, images=_below(pair, root)).to_json() for pair in pairs],
        "rationales": [
            {"id": sample.id, "images": _below(sample, root), "question": sample.question, "response": response}
            for sample, response in raps
        ],
        "examples": [asdict(example) for example in examples],
    }
    place.mkdir(parents=True, exist_ok=True)
    if isinstance(model, Scorer):
        save_text_model(model.text_model, place / "scorer")
    else:
        save_adapter(model, place / "adapter")
    write_json(place / BATCH, kept)


def _command(place: Path) -> str:
    """For a shell, whatever the directory is called."""
    return f"srcfast replay {shlex.quote(str(place))}"


def _below(record: Preference | Sample, root: Path) -> tuple[str, ...]:
    """The record's images relative to `root`."""
    return tuple(os.path.relpath(record.image_root.resolve() / image, root) for image in record.images)


def trained_hash(model: Any) -> str:
    return weights_hash(*(model.parameters() if isinstance(model, Scorer) else lora_parameters(model)))
