"""A batch whose loss or gradient was not finite: kept on disk with the weights it met, and run again.

`not-finite/` holds `batch.json` (the step's records, its settings, the hash of the trained weights) and those weights, before
the step: `adapter/`, or the R-Scorer that is trained whole, `scorer/`. `srcfast replay not-finite` runs the step again, on one
device whatever number of ranks it had, and says whether it comes out as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from srcfast.config.settings import Config, TrainingConfig
from srcfast.data.jsonl import parse_object, regular
from srcfast.data.records import Fields, Preference, Sample
from srcfast.errors import InputError
from srcfast.models.lora import load_adapter
from srcfast.stages.dpo import pair_denominator, preference_items, preference_loss
from srcfast.stages.nonfinite import BATCH, trained_hash
from srcfast.stages.pair_trees import pair_logit_rows
from srcfast.stages.policy import features_of, load_model, load_scorer_for
from srcfast.stages.rationale import (
    RationalePair,
    rationale_loss,
    rationale_trees,
    response_logit_rows,
    response_tokens,
)
from srcfast.stages.scorer_training import ScorerExample, num_slots, scorer_items, scorer_loss, segment_ends
from srcfast.training.items import Metrics
from srcfast.training.loop import rerun_step


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
            fix="name a not-finite/ directory",
        ) from error
    if stage == "scorer":
        return _replay_scorer(place, config, examples, step, loop, expected)
    model = load_model(config, None)
    load_adapter(model, place / "adapter")  # which before the first step changes nothing
    _check_weights(place / "adapter", model, expected)
    features = features_of(model, [*pairs, *(sample for sample, _ in raps)])
    if stage == "rationale":
        return rerun_step(
            model,
            rationale_trees(model, raps),
            step,
            loss=rationale_loss,
            denominator=response_tokens,
            settings=loop,
            features=features,
            rows=response_logit_rows,
        )
    items = dict(zip(places, preference_items(model, pairs, config.curation.weighting, raps), strict=True))
    return rerun_step(
        model,
        [items[number] for number in range(len(items))],
        step,
        loss=preference_loss(config.dpo),
        denominator=pair_denominator,
        settings=loop,
        features=features,
        rows=pair_logit_rows,
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
    judge = load_scorer_for(config.model_copy(update={"scorer": kept})).requires_grad_(True)
    _check_weights(place / "scorer", judge, expected)
    return rerun_step(
        judge.text_model,
        scorer_items(judge, examples),
        step,
        loss=scorer_loss(judge),
        denominator=num_slots,
        settings=loop,
        rows=segment_ends,
    )


def _check_weights(place: Path, model: Any, expected: str) -> None:
    if (found := trained_hash(model)) != expected:
        raise InputError(file=place, expected=f"weights with SHA-256 {expected}", found=found)


def _loop(values: Any) -> TrainingConfig:
    if not isinstance(values, dict):
        raise ValueError(f"loop: expected a mapping, found {values!r}")
    names = {name: value for name, value in values.items() if name not in ("seed", "deterministic")}
    seed, deterministic = values.get("seed", 0), values.get("deterministic", False)
    if type(seed) is not int or type(deterministic) is not bool:
        raise ValueError(f"seed {seed!r}, deterministic {deterministic!r}")
    return TrainingConfig(**names).seeded(seed, deterministic)


def _rap(row: dict[str, Any], file: Path, root: Path) -> RationalePair:
    fields = Fields(row, file, None)
    sample = Sample(fields.identifier("id"), fields.images(), fields.text("question"), "", image_root=root)
    return sample, fields.text("response")


def _example(row: Any) -> ScorerExample:
    example = TypeAdapter(ScorerExample).validate_python(row)
    if not all(0 <= first < len(example.variants) > second >= -1 for first, second in example.pairs):
        raise ValueError(f"pairs {example.pairs} of {len(example.variants)} variants")
    return example
