"""Run again a batch whose loss or gradient was not finite, from the records and weights that `nonfinite` stored.

`not-finite/` holds `batch.json` (the step's records, its settings, the hash of the trained weights) and those weights, before
the step: `adapter/`, or the R-Scorer that is trained whole, `scorer/`. `srcfast replay not-finite` runs the step again, on one
device whatever number of ranks it had, and says whether the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from srcfast.config.settings import Config, TrainingConfig
from srcfast.data.jsonl import parse_object, regular
from srcfast.data.rationale_pairs import RationalePair
from srcfast.data.records import Fields, Preference, Sample
from srcfast.errors import InputError
from srcfast.models.lora import load_adapter
from srcfast.models.protocols import VisionLanguageModel
from srcfast.stages.credit import credited
from srcfast.stages.dpo import pair_denominator, preference_items, preference_loss
from srcfast.stages.nonfinite import BATCH, trained_hash
from srcfast.stages.pair_trees import pair_logit_rows
from srcfast.stages.policy import features_of, load_model, load_scorer_for
from srcfast.stages.rationale import rationale_loss, rationale_trees, response_logit_rows, response_tokens
from srcfast.stages.scorer_training import ScorerExample, num_slots, scorer_items, scorer_loss, segment_ends
from srcfast.training.items import Metrics, Objective
from srcfast.training.loop import rerun_step


@dataclass(frozen=True)
class StoredBatch:
    """What `batch.json` holds, checked.

    Attributes:
        stage: "rationale", "dpo" or "scorer".
        step: of the training.
        weights_sha256: of the trained weights before the step.
        config: the run's.
        loop: the training's settings.
        pairs, rationales, examples: the batch's records by kind.
        positions: in the batch, of these records, kind after kind.
    """

    stage: str
    step: int
    weights_sha256: str
    config: Config
    loop: TrainingConfig
    pairs: list[Preference]
    rationales: list[RationalePair]
    examples: list[ScorerExample]
    positions: list[int]


def replay(directory: Path) -> Metrics:
    """Run the stored batch of a `not-finite/` directory again; return its metrics, where they are finite this time.

    Raises:
        NotFinite: loss or gradient is not finite, as before.
        InputError: what was stored can't be read, or has been changed.
    """
    batch = _read_batch(directory / BATCH)
    if batch.stage == "scorer":
        return _replay_scorer(directory / "scorer", batch)
    model = load_model(batch.config, None)
    load_adapter(model, directory / "adapter")  # not checked for effect: before the first step it has none
    _check_weights(directory / "adapter", model, batch.weights_sha256)
    features = features_of(model, [*batch.pairs, *(sample for sample, _ in batch.rationales)])
    if batch.stage == "rationale":
        return rerun_step(
            model,
            rationale_trees(model, batch.rationales),
            batch.step,
            objective=Objective(rationale_loss, response_tokens, response_logit_rows),
            settings=batch.loop,
            features=features,
        )
    pairs = credited(batch.pairs, batch.config.dpo.credit)
    items = preference_items(model, pairs, batch.config.curation.weighting, batch.rationales)
    item_at = dict(zip(batch.positions, items, strict=True))
    return rerun_step(
        model,
        [item_at[position] for position in range(len(items))],
        batch.step,
        objective=Objective(preference_loss(batch.config.dpo), pair_denominator, pair_logit_rows),
        settings=batch.loop,
        features=features,
    )


def _replay_scorer(directory: Path, batch: StoredBatch) -> Metrics:
    """Run the batch again on the R-Scorer in this directory, which is trained whole."""
    stored = batch.config.scorer.replace(path=str(directory))
    scorer = load_scorer_for(batch.config.replace(scorer=stored), to_train=True).requires_grad_(True)
    _check_weights(directory, scorer, batch.weights_sha256)
    return rerun_step(
        scorer.text_model,
        scorer_items(scorer, batch.examples),
        batch.step,
        objective=Objective(scorer_loss(scorer), num_slots, segment_ends),
        settings=batch.loop,
    )


def _read_batch(file: Path) -> StoredBatch:
    """Read `batch.json` and check it.

    Raises:
        InputError: it can't be read, a field is missing or of another type, or the records don't fit the stage.
    """
    try:
        row = parse_object(regular(file).read_bytes())
        root = Path(row["image_root"])
        batch = StoredBatch(
            config=Config.model_validate(row["config"]),
            loop=_loop(row["loop"]),
            step=row["step"],
            stage=row["stage"],
            weights_sha256=row["weights_sha256"],
            positions=[int(position) for position in row["places"]],
            pairs=[Preference.from_json(pair, file=file, line=None, image_root=root) for pair in row["preferences"]],
            rationales=[_rationale(rationale, file, root) for rationale in row["rationales"]],
            examples=[_example(example) for example in row["examples"]],
        )
        _check_batch(batch)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            file=file,
            expected="a batch that was stored because its numbers were not finite",
            found=error,
            fix="name a not-finite/ directory",
        ) from error
    return batch


def _check_batch(batch: StoredBatch) -> None:
    """Raise ValueError where step, stage, records and positions don't fit each other."""
    records: dict[str, Sequence[Any]] = {"rationale": batch.rationales, "dpo": batch.pairs, "scorer": batch.examples}
    if type(batch.step) is not int or not 0 <= batch.step < 1 << 31 or batch.stage not in tuple(records):
        raise ValueError(f"step {batch.step!r} of stage {batch.stage!r}")
    if not records[batch.stage]:
        raise ValueError(f"nothing that stage {batch.stage!r} trains on")
    total = sum(len(rows) for rows in records.values())
    if sorted(batch.positions) != list(range(total)):
        raise ValueError(f"places {batch.positions} of {total} records")


def _check_weights(directory: Path, model: VisionLanguageModel, expected: str) -> None:
    """Raise InputError where the stored weights have another hash than the batch names."""
    if (actual := trained_hash(model)) != expected:
        raise InputError(file=directory, expected=f"weights with SHA-256 {expected}", found=actual)


def _loop(values: Any) -> TrainingConfig:
    """Read the training's settings, seed and determinism among them; raise ValueError where they are none."""
    if not isinstance(values, dict):
        raise ValueError(f"loop: expected a mapping, found {values!r}")
    settings = {name: value for name, value in values.items() if name not in ("seed", "deterministic")}
    seed, deterministic = values.get("seed", 0), values.get("deterministic", False)
    if type(seed) is not int or type(deterministic) is not bool:
        raise ValueError(f"seed {seed!r}, deterministic {deterministic!r}")
    return TrainingConfig(**settings).seeded(seed, deterministic)


def _rationale(row: dict[str, Any], file: Path, root: Path) -> RationalePair:
    """Read one rationale-answer pair; its images lie below `root`."""
    fields = Fields(row, file, None)
    name, images, turns = fields.identifier("id"), fields.images(), fields.turns()
    sample = Sample(name, images, fields.text("question"), "", image_root=root, turns=turns)
    return sample, fields.text("response")


def _example(row: Any) -> ScorerExample:
    """Read one example of the R-Scorer; raise ValueError where a pair names no variant."""
    example = TypeAdapter(ScorerExample).validate_python(row)
    if not all(0 <= first < len(example.variants) > second >= -1 for first, second in example.pairs):
        raise ValueError(f"pairs {example.pairs} of {len(example.variants)} variants")
    if example.verdicts and len(example.verdicts) != len(example.pairs):
        raise ValueError(f"{len(example.verdicts)} verdicts on {len(example.pairs)} pairs")
    return example
