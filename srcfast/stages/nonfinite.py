"""Store a batch whose loss or gradient was not finite, with the weights before its step; `replay` runs it again."""

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
from srcfast.models.protocols import HasDecoder
from srcfast.models.scorer import Scorer
from srcfast.models.text_model import save_text_model
from srcfast.training.checkpoint import weights_hash
from srcfast.training.items import NotFinite

DIRECTORY, BATCH = "not-finite", "batch.json"


@contextmanager
def dump_nonfinite_batch(
    stage: str,
    config: Config,
    model: HasDecoder | Scorer,
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
        target, step, text = directory / DIRECTORY, error.step, str(error)
        batch = [records[index] for index in global_batch(len(records), step, loop)]
        distributed.run_on_rank_zero(lambda: _write(target, stage, config, model, batch, loop, step, text))
        raise SrcfastError(f"{text}. The batch is stored; to run it again: {_command(target)}") from error


def _write(
    directory: Path,
    stage: str,
    config: Config,
    model: HasDecoder | Scorer,
    batch: Sequence[Any],
    loop: TrainingConfig,
    step: int,
    error: str,
) -> None:
    """Write `batch.json` and the weights that `model` has now, which are those before the step."""
    pairs = [record for record in batch if isinstance(record, Preference)]
    raps = [record for record in batch if isinstance(record, tuple)]
    examples = [record for record in batch if not isinstance(record, tuple | Preference)]
    kinds = [isinstance(record, Preference) for record in batch]
    owners: list[Preference | Sample] = [*pairs, *(sample for sample, _ in raps)]
    # Examples of the R-Scorer have no images.
    root = Path(os.path.commonpath([owner.image_root.resolve() for owner in owners] or [Path.cwd()]))
    contents = {
        "stage": stage,
        "step": step,
        "error": error,
        "weights_sha256": trained_hash(model),
        "command": _command(directory),
        "loop": loop.loop(),
        "config": config.model_dump(mode="json"),
        "image_root": str(root),
        # The positions in the batch of the records below, kind after kind: dropout of a tree depends on its position.
        "places": sorted(range(len(batch)), key=lambda number: not kinds[number]),
        "preferences": [replace(pair, images=_below(pair, root)).to_json() for pair in pairs],
        "rationales": [
            {
                "id": sample.id,
                "images": _below(sample, root),
                "question": sample.question,
                "response": response,
                **({"turns": [turn.to_json() for turn in sample.turns]} if sample.turns else {}),
            }
            for sample, response in raps
        ],
        "examples": [asdict(example) for example in examples],
    }
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(model, Scorer):
        save_text_model(model.text_model, directory / "scorer")
    else:
        save_adapter(model, directory / "adapter")
    write_json(directory / BATCH, contents)


def _command(directory: Path) -> str:
    """Return the command that runs the batch again, quoted for a shell."""
    return f"srcfast replay {shlex.quote(str(directory))}"


def _below(record: Preference | Sample, root: Path) -> tuple[str, ...]:
    """Return the record's images relative to `root`."""
    return tuple(os.path.relpath(record.image_root.resolve() / image, root) for image in record.images)


def trained_hash(model: HasDecoder | Scorer) -> str:
    """Hash the weights that training changes: the R-Scorer's, or the adapter's."""
    return weights_hash(*(model.parameters() if isinstance(model, Scorer) else lora_parameters(model)))
