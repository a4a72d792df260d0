"""A batch whose loss or gradient was not finite: kept on disk with the weights it met, and run again.

`not-finite/` holds `batch.json` (the step's records, its settings, the hash of the trained weights) and those weights, before
the step: `adapter/`, or the R-Scorer that is trained whole, `scorer/`. `srcfast replay not-finite` runs the step again, on one
device whatever number of ranks it had, and says whether it comes out as before.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from srcfast import distributed
from srcfast.config.settings import Config, TrainingConfig
from srcfast.data.batching import global_batch
from srcfast.data.jsonl import parse_object, regular, write_json
from srcfast.data.records import Fields, Preference, Sample
from srcfast.errors import InputError, SrcfastError
from srcfast.models.lora import load_adapter, lora_parameters, save_adapter
from srcfast.models.scorer import Scorer
from srcfast.models.text_model import save_text_model
from srcfast.stages.dpo import loss_rows, pair_denominator, preference_items, preference_loss
from srcfast.stages.policy import features_of, load_judge, load_model
from srcfast.stages.rationale import Rap, rationale_loss, rationale_trees, response_rows, response_tokens
from srcfast.stages.scorer_training import ScorerExample, num_slots, scorer_items, scorer_loss, segment_ends
from srcfast.training.checkpoint import weights_hash
from srcfast.training.loop import Metrics, NotFinite, run_again

DIRECTORY, BATCH = "not-finite", "batch.json"


@contextmanager
def kept_if_not_finite(
    stage: str,
    config: Config,
    model: Any,
    records: Sequence[Preference | Rap | ScorerExample],
    loop: TrainingConfig,
    directory: Path,
) -> Iterator[None]:
    """The body trains `model` on items made of these records, one each, in their order.

    Args:
        stage: "rationale", "dpo" or "scorer".
        config: the run's.
        model: with an adapter; or the R-Scorer.
        records: preferences, or samples with their responses; or the R-Scorer's examples.
        loop: the training's settings.
        directory: in which `not-finite/` is made.

    Raises:
        SrcfastError: a loss or gradient was not finite; the command that runs the batch again is told.
    """
    try:
        yield
    except NotFinite as error:
        place, step, text = directory / DIRECTORY, error.step, str(error)
        batch = [records[index] for index in global_batch(len(records), step, loop)]
        distributed.from_main(lambda: _write(place, stage, config, model, batch, loop, step, text))
        raise SrcfastError(f"{text}. The batch is kept; to run it again: {_command(place)}") from error


def replay(place: Path) -> Metrics:
    """Run the kept batch again; its numbers, where they are finite this time.

    Raises:
        NotFinite: it came out as before.
        InputError: what was kept can't be read, or has been changed.
    """
    file = place / BATCH
    try:
        found = parse_object(regular(file).read_bytes())
        config = Config.model_validate(found["config"])
        loop = _loop(found["loop"])
        root, step, stage, expected = Path(found["image_root"]), found["step"], found["stage"], found["weights_sha256"]
        places = [int(place) for place in found["places"]]
        pairs = [Preference.from_json(row, file=file, line=None, image_root=root) for row in found["preferences"]]
        raps = [_rap(row, file, root) for row in found["rationales"]]
        examples = [_example(row) for row in found["examples"]]
        records: dict[str, Sequence[Any]] = {"rationale": raps, "dpo": pairs, "scorer": examples}
        if type(step) is not int or not 0 <= step < 1 << 31 or stage not in tuple(records):
            raise ValueError(f"step {step!r} of stage {stage!r}")
        if not records[stage]:
            raise ValueError(f"nothing that stage {stage!r} trains on")
        if sorted(places) != list(range(len(pairs) + len(raps) + len(examples))):
            raise ValueError(f"places {places} of {len(pairs) + len(raps) + len(examples)} records")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            file=file,
            expected="a batch that was kept for its numbers",
            found=error,
            mend="name a not-finite/ directory",
        ) from error
    if stage == "scorer":
        return _replay_scorer(place, config, examples, step, loop, expected)
    model = load_model(config, None)
    load_adapter(model, place / "adapter")  # which before the first step changes nothing
    _check_weights(place / "adapter", model, expected)
    features = features_of(model, [*pairs, *(sample for sample, _ in raps)])
    if stage == "rationale":
        return run_again(
            model,
            rationale_trees(model, raps),
            step,
            loss=rationale_loss,
            denominator=response_tokens,
            settings=loop,
            features=features,
            rows=response_rows,
        )
    items = dict(zip(places, preference_items(model, pairs, config.curation.weighting, raps), strict=True))
    return run_again(
        model,
        [items[number] for number in range(len(items))],
        step,
        loss=preference_loss(config.dpo),
        denominator=pair_denominator,
        settings=loop,
        features=features,
        rows=loss_rows,
    )


def _replay_scorer(
    place: Path,
    config: Config,
    examples: Sequence[ScorerExample],
    step: int,
    loop: TrainingConfig,
    expected: str,
) -> Metrics:
    kept = config.scorer.model_copy(update={"path": str(place / "scorer")})
    judge = load_judge(config.model_copy(update={"scorer": kept})).requires_grad_(True)
    _check_weights(place / "scorer", judge, expected)
    return run_again(
        judge.text_model,
        scorer_items(judge, examples),
        step,
        loss=scorer_loss(judge),
        denominator=num_slots,
        settings=loop,
        rows=segment_ends,
    )


def _check_weights(place: Path, model: Any, expected: str) -> None:
    if (found := _trained(model)) != expected:
        raise InputError(file=place, expected=f"weights with SHA-256 {expected}", found=found)


def _write(
    place: Path,
    stage: str,
    config: Config,
    model: Any,
    batch: Sequence[Preference | Rap | ScorerExample],
    loop: TrainingConfig,
    step: int,
    error: str,
) -> None:
    pairs = [record for record in batch if isinstance(record, Preference)]
    raps = [record for record in batch if isinstance(record, tuple)]
    examples = [record for record in batch if isinstance(record, ScorerExample)]
    kinds = [isinstance(record, Preference) for record in batch]
    owners: list[Preference | Sample] = [*pairs, *(sample for sample, _ in raps)]
    # Examples of the R-Scorer have no images.
    root = Path(os.path.commonpath([owner.image_root.resolve() for owner in owners] or [Path.cwd()]))
    kept = {
        "stage": stage,
        "step": step,
        "error": error,
        "weights_sha256": _trained(model),
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


def _loop(values: dict[str, Any]) -> TrainingConfig:
    names = {name: value for name, value in values.items() if name not in ("seed", "deterministic")}
    seed, deterministic = values.get("seed", 0), values.get("deterministic", False)
    if type(seed) is not int or type(deterministic) is not bool:
        raise ValueError(f"seed {seed!r}, deterministic {deterministic!r}")
    return TrainingConfig(**names).seeded(seed, deterministic)


def _rap(row: dict[str, Any], file: Path, root: Path) -> Rap:
    fields = Fields(row, file, None)
    sample = Sample(fields.identifier("id"), fields.images(), fields.text("question"), "", image_root=root)
    return sample, fields.text("response")


def _example(row: Any) -> ScorerExample:
    example = TypeAdapter(ScorerExample).validate_python(row)
    if not all(0 <= first < len(example.variants) > second >= -1 for first, second in example.pairs):
        raise ValueError(f"pairs {example.pairs} of {len(example.variants)} variants")
    return example


def _trained(model: Any) -> str:
    return weights_hash(*(model.parameters() if isinstance(model, Scorer) else lora_parameters(model)))
