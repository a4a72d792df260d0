"""A batch whose numbers were not finite is kept, and comes out as before when it is run again; or it is said that it doesn't."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from helpers.made_rows import preference_rows, write_rows
from safetensors.torch import load_file, save_file

import srcfast.world
from srcfast.config.load import load_config
from srcfast.data.batching import global_batch
from srcfast.data.rationale_format import parse_response
from srcfast.data.rationale_pairs import RationalePair, build_raps
from srcfast.data.readers import read_samples
from srcfast.data.records import Preference, Sample
from srcfast.errors import SrcfastError
from srcfast.models.checkpoint import model_hash
from srcfast.stages.dpo import train_preference
from srcfast.stages.logprobs import reference_logprobs
from srcfast.stages.nonfinite import dump_nonfinite_batch
from srcfast.stages.policy import features_of, load_model, load_scorer_for
from srcfast.stages.rationale import fine_tune_rationale
from srcfast.stages.scorer_training import scorer_examples, train_scorer
from srcfast.training.items import NotFinite
from srcfast.world.claims import VOCABULARY
from srcfast.world.samples import world_samples

EMBEDDED = Path(srcfast.world.__file__).parent / "assets" / "scorer"
Srcfast = Callable[..., Result]
LOOP = ("micro_batch_size=2", "gradient_accumulation_steps=1", "--quiet")


@pytest.fixture
def stopped(srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path) -> tuple[Path, str]:
    """(not-finite/, what was said) of a DPO training in which one pair's reference is beyond fp32."""
    files = ("--model", model_dir, "--image-root", image_root, "--output", tmp_path / "out", "lora.r=4", *LOOP)
    rows = preference_rows(4, seed=1)
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    rows[2] |= {"reference_chosen_logprob": -1.0, "reference_rejected_logprob": -1e300}
    rows[2] |= {
        "reference_hash": f"base:{model_hash(model_dir)} adapter:none float32 none"
    }  # else it would be looked at first
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    assert srcfast("dpo", "--data", pairs, *files).exit_code == 0
    result = srcfast("dpo", "--data", bad, *files)
    assert result.exit_code == 1 and "Traceback" not in result.output
    return tmp_path / "out" / "not-finite", result.output


def test_a_batch_that_is_not_finite_is_kept_and_comes_out_as_before(
    srcfast: Srcfast, stopped: tuple[Path, str]
) -> None:
    place, told = stopped
    assert f"srcfast replay {place}" in told
    kept = json.loads((place / "batch.json").read_text())
    assert {"step", "weights_sha256", "config", "error"} <= set(kept)
    assert len(kept["preferences"]) == 2 and "p2" in {row["sample_id"] for row in kept["preferences"]}
    result = srcfast("replay", place)
    assert result.exit_code == 1
    assert f"reproduced: step {kept['step']}: the loss is not finite" in result.output


def test_where_it_does_not_come_out_as_before_that_is_said(srcfast: Srcfast, stopped: tuple[Path, str]) -> None:
    place, _ = stopped
    kept = json.loads((place / "batch.json").read_text())
    for row in kept["preferences"]:
        row["reference_rejected_logprob"] = -1.0
    (place / "batch.json").write_text(json.dumps(kept))
    result = srcfast("replay", place)
    assert result.exit_code == 0 and f"not reproduced: step {kept['step']} has loss" in result.output


def test_other_weights_than_those_it_met_are_refused(srcfast: Srcfast, stopped: tuple[Path, str]) -> None:
    place, _ = stopped
    kept = json.loads((place / "batch.json").read_text())
    (place / "batch.json").write_text(json.dumps(kept | {"weights_sha256": "0" * 64}))
    result = srcfast("replay", place)
    assert result.exit_code == 2 and f"expected weights with SHA-256 {'0' * 64}" in result.output


def test_a_directory_that_holds_no_batch_is_named(srcfast: Srcfast, tmp_path: Path) -> None:
    result = srcfast("replay", tmp_path)
    assert result.exit_code == 2 and "batch.json" in result.output and "Traceback" not in result.output


def rationale_pairs(image_root: Path) -> list[RationalePair]:
    return [
        (
            Sample(f"s{n}", (name,), "what color is it", "red", image_root=image_root),
            f"<see> {name}. </see> <answer> red </answer>",
        )
        for n, name in enumerate(("a.png", "b.png", "c.png"))
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_run_again_has_the_numbers_of_the_training(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path, dropout: float
) -> None:
    words = [f"model.path={model_dir}", "lora.r=4", f"lora.dropout={dropout}", "rationale.micro_batch_size=2"]
    config = load_config(None, words, None)
    loop = config.rationale
    raps = rationale_pairs(image_root)
    model = load_model(config, config.lora)
    with (
        pytest.raises(SrcfastError, match="step 0: made up.*srcfast replay"),
        dump_nonfinite_batch("rationale", config, model, raps, loop, tmp_path),
    ):
        raise NotFinite(0, "step 0: made up")
    features = features_of(model, [sample for sample, _ in raps])
    first = fine_tune_rationale(model, raps, loop, features=features)[0]
    told = srcfast("replay", tmp_path / "not-finite").output
    assert f"has loss {first['loss']:.6g} and gradient norm {first['grad_norm']:.6g} here" in told


def test_a_step_of_pairs_and_rehearsed_rationales_with_dropout_is_run_again_in_its_order(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path
) -> None:
    words = [f"model.path={model_dir}", "lora.r=4", "lora.dropout=0.3", "dpo.rehearsal_weight=0.5"]
    config = load_config(None, [*words, "dpo.micro_batch_size=3", "dpo.gradient_accumulation_steps=3"], None)
    loop = config.dpo
    plain = [
        Preference.from_json(row, file="pairs", line=number, image_root=image_root)
        for number, row in enumerate(preference_rows(4, seed=2))
    ]
    raps = rationale_pairs(image_root)
    model = load_model(config, config.lora)
    features = features_of(model, [*plain, *(sample for sample, _ in raps)])
    pairs = reference_logprobs(
        model, plain, reference_hash="made up", token_budget=loop.token_budget, features=features
    )
    records = [*pairs, *raps]
    kinds = [isinstance(records[index], Preference) for index in global_batch(7, 0, loop)]
    assert kinds != sorted(kinds, reverse=True)  # mixed: their order can't be told from what they are
    with (
        pytest.raises(SrcfastError, match="srcfast replay"),
        dump_nonfinite_batch("dpo", config, model, records, loop, tmp_path),
    ):
        raise NotFinite(0, "step 0: made up")
    first = train_preference(model, pairs, loop, expected_reference_hash="made up", features=features, rehearsal=raps)[
        0
    ]
    told = srcfast("replay", tmp_path / "not-finite").output
    assert f"has loss {first['loss']:.6g} and gradient norm {first['grad_norm']:.6g} here" in told


# The R-Scorer, which is trained whole -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of samples from which rationale-answer pairs, and faults in them, are made."""
    folder = tmp_path_factory.mktemp("world")
    samples = world_samples("train", 9, 5, image_dir=folder)
    return write_rows(folder / "samples.jsonl", [sample.to_json() for sample in samples])


def with_a_bad_weight(folder: Path) -> Path:
    """A copy of the embedded R-Scorer in which one weight makes the loss what is not finite."""
    folder.mkdir()
    for file in EMBEDDED.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 3e38  # finite, as it has to be; what it is multiplied by is not
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def stopped_scorer(srcfast: Srcfast, world: Path, tmp_path: Path) -> tuple[Path, str]:
    """(not-finite/, what was said) of an R-Scorer's training with such a weight."""
    files = ("--data", world, "--image-root", world.parent, "--scorer", with_a_bad_weight(tmp_path / "bad"))
    result = srcfast("scorer", *files, "--output", tmp_path / "out", *LOOP)
    assert result.exit_code == 1 and "Traceback" not in result.output
    return tmp_path / "out" / "not-finite", result.output


def test_a_batch_of_the_r_scorer_s_is_kept_and_comes_out_as_before(
    srcfast: Srcfast, stopped_scorer: tuple[Path, str]
) -> None:
    place, told = stopped_scorer
    assert f"srcfast replay {place}" in told
    kept = json.loads((place / "batch.json").read_text())
    assert len(kept["examples"]) == 2 and kept["stage"] == "scorer" and kept["step"] == 0
    result = srcfast("replay", place)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "reproduced: step 0: the loss is not finite" in result.output
    assert kept["examples"][0]["key"] in result.output  # named as in the training


def test_another_r_scorer_than_the_one_it_met_is_refused(srcfast: Srcfast, stopped_scorer: tuple[Path, str]) -> None:
    place, _ = stopped_scorer
    (place / "scorer" / "model.safetensors").write_bytes((EMBEDDED / "model.safetensors").read_bytes())
    result = srcfast("replay", place)
    assert result.exit_code == 2 and "expected weights with SHA-256" in result.output


def test_a_step_of_the_r_scorer_s_run_again_has_the_numbers_of_the_training(
    srcfast: Srcfast, world: Path, tmp_path: Path
) -> None:
    config = load_config(None, ["scorer_training.micro_batch_size=3"], None)
    loop = config.scorer_training
    samples = read_samples(world, format="jsonl", image_root=world.parent, rejected=[])
    parsed = [(sample, parse_response(text)) for sample, text in build_raps(samples, "tagged")[0]]
    raps = [(one, own.perception, own.reasoning, own.answer or "") for one, own in parsed]
    examples = scorer_examples(raps, random.Random(0), dict(VOCABULARY))
    judge = load_scorer_for(config)
    with (
        pytest.raises(SrcfastError, match="srcfast replay"),
        dump_nonfinite_batch("scorer", config, judge, examples, loop, tmp_path),
    ):
        raise NotFinite(1, "step 1: made up")
    # The step's examples come first in another training, whose first step has the same weights.
    batch = [examples[index] for index in global_batch(len(examples), 1, loop)]
    first = train_scorer(judge, batch, loop)[0]
    told = srcfast("replay", tmp_path / "not-finite").output
    assert f"has loss {first['loss']:.6g} and gradient norm {first['grad_norm']:.6g} here" in told


def test_a_batch_whose_records_were_changed_in_number_is_refused(
    srcfast: Srcfast, stopped_scorer: tuple[Path, str]
) -> None:
    place, _ = stopped_scorer
    kept = json.loads((place / "batch.json").read_text())
    (place / "batch.json").write_text(json.dumps(kept | {"examples": kept["examples"][:1]}))
    result = srcfast("replay", place)
    assert (
        result.exit_code == 2
        and "expected a batch that was stored because its numbers were not finite" in result.output
    )
