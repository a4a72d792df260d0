"""Nothing is ever unpickled: bombs lie under every name that other projects read, and none goes off."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from helpers.bombs import NAMES, bomb, plant

from srcfast.config.settings import Config, LoRAConfig
from srcfast.errors import InputError
from srcfast.models import load_lvlm
from srcfast.models.lora import load_adapter
from srcfast.models.scorer import load_scorer
from srcfast.models.text_model import load_text_model
from srcfast.stages.policy import Policy
from srcfast.training.checkpoint import SavedTraining, load_training, save_training

Srcfast = Callable[..., Result]
ASSETS = Path(__file__).parents[3] / "srcfast" / "world" / "assets"
PREFERENCE = {"images": ["a.png"], "prompt": "what color", "chosen": "red", "rejected": "blue"}


def test_each_bomb_goes_off_where_it_is_unpickled(witness: Path) -> None:
    for name in NAMES:
        file = witness.with_name(name)
        file.write_bytes(bomb(name, witness))
        if name.endswith(".npy"):
            np.load(file, allow_pickle=True)
        elif name.endswith((".bin", ".pt", ".pth", ".ckpt")):
            torch.load(file, weights_only=False)
        else:
            pickle.loads(file.read_bytes())
        assert witness.exists(), name
        witness.unlink()


@pytest.fixture
def model_dir(sound_model: Path, tmp_path: Path, witness: Path) -> Path:
    """A sound checkpoint with bombs of all names beside its files."""
    directory = Path(shutil.copytree(sound_model, tmp_path / "model"))
    plant([directory, directory / "original"], witness)
    return directory


@pytest.fixture
def adapter_dir(sound_adapter: Path, tmp_path: Path, witness: Path) -> Path:
    directory = Path(shutil.copytree(sound_adapter, tmp_path / "adapter"))
    plant([directory], witness)
    return directory


def test_bombs_beside_sound_files_are_never_opened(
    model_dir: Path, adapter_dir: Path, tmp_path: Path, witness: Path
) -> None:
    load_lvlm(model_dir, lora=adapter_dir)
    policy = Policy(Config.model_validate({"model": {"path": str(model_dir)}}), [])
    policy.use(adapter_dir)
    policy.hash()
    judge = Path(shutil.copytree(ASSETS / "scorer", tmp_path / "scorer"))
    plant([judge], witness)
    load_text_model(judge)
    load_scorer(judge)
    assert not witness.exists()


@pytest.mark.parametrize("load", [load_lvlm, load_text_model, load_scorer])
def test_a_checkpoint_of_pickles_alone_is_refused_by_name(load: Callable, tmp_path: Path, witness: Path) -> None:
    source = ASSETS / ("base" if load is load_lvlm else "scorer")
    directory = Path(shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    plant([directory], witness)
    with pytest.raises(InputError, match=r"found .*pytorch_model\.bin.*srcfast reads no pickle"):
        load(directory)
    index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"pytorch_model\.bin: expected a whole safetensors file"):
        load(directory)
    assert not witness.exists()


@pytest.mark.parametrize("form", ["model.bin", "model.pkl", "model.npy"])
def test_a_pickle_that_calls_itself_safetensors_is_refused(
    model_dir: Path, adapter_dir: Path, sound_model: Path, witness: Path, form: str
) -> None:
    (adapter_dir / "adapter_model.safetensors").write_bytes(bomb(form, witness))
    with pytest.raises(InputError, match=r"expected an adapter"):
        load_adapter(load_lvlm(sound_model), adapter_dir)
    (model_dir / "model.safetensors").write_bytes(bomb(form, witness))
    with pytest.raises(InputError, match="safetensors"):
        load_lvlm(model_dir, lora=LoRAConfig(r=2, alpha=32.0))
    assert not witness.exists()


def test_an_adapter_of_pickles_alone_is_refused(adapter_dir: Path, sound_model: Path, witness: Path) -> None:
    (adapter_dir / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"expected an adapter"):
        load_adapter(load_lvlm(sound_model), adapter_dir)
    assert not witness.exists()


def test_a_training_continues_past_bombs_in_its_checkpoints(tmp_path: Path, witness: Path) -> None:
    checkpoints, identity = tmp_path / "run" / "checkpoint", {"stage": {"name": "dpo"}}
    for step in (1, 2):
        moments = {"exp_avg": torch.full((3,), float(step))}
        save_training(checkpoints, SavedTraining(step, torch.ones(3), moments, [], identity, 1.0))
    plant([checkpoints, checkpoints / "step-00000001", checkpoints / "step-00000002"], witness)
    found = load_training(checkpoints, identity)
    assert found is not None and found.step == 2
    for name in ("optimizer.safetensors", "weights.safetensors"):
        (checkpoints / "step-00000002" / name).write_bytes(bomb("optimizer.pt", witness))
    with pytest.warns(RuntimeWarning, match="step-00000002: a damaged checkpoint"):
        found = load_training(checkpoints, identity)
    assert found is not None and found.step == 1 and not witness.exists()


def test_commands_run_among_bombs(
    srcfast: Srcfast, model_dir: Path, adapter_dir: Path, images: Path, tmp_path: Path, witness: Path
) -> None:
    """Beside the model, the adapter, the data, the images and in the output's own folders."""
    data, samples, out = tmp_path / "pairs.jsonl", tmp_path / "samples.jsonl", tmp_path / "out"
    data.write_text(json.dumps(PREFERENCE) + "\n")
    sample = {"id": "s", "image": "a.png", "question": "what color", "answer": "red", "facts": ["It is red."]}
    samples.write_text(json.dumps(sample) + "\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"images": ["a.png"], "prompt": "what color", "response": "red"}) + "\n")
    plant([images, out, out / "checkpoint", out / "checkpoint" / "step-00000001", tmp_path], witness)
    root = ("--image-root", images)
    model, adapter = ("--model", model_dir), ("--adapter", adapter_dir)
    short = ("micro_batch_size=1", "gradient_accumulation_steps=1", "epochs=1")
    commands = {
        "dpo": (*model, *adapter, "--data", data, *root, "--output", out, *short),
        "logprob": (*model, *adapter, "--data", rows, *root, "--output", tmp_path / "logprobs.jsonl"),
        "inspect": (*model, "--data", samples, *root, f"output={out}"),
        "evaluate": (*model, "--data", samples, *root, "--output", out, "max_new_tokens=4"),
        "merge": (*model, *adapter, "--output", tmp_path / "merged"),
        "estimate": (*model, "--memory", "1GiB"),
    }
    for name, words in commands.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the planted checkpoint is called damaged
            result = srcfast(name, *words)
        assert result.exit_code == 0, (name, result.output, result.exception)
        assert not witness.exists(), name
    assert not {file.name for file in (tmp_path / "merged").iterdir()} & set(NAMES), "none is carried on"


@pytest.mark.parametrize("format", ["jsonl", "llava", "messages", "trl", "vlmeval_tsv"])
@pytest.mark.parametrize("form", ["rows.pkl", "rows.npy", "rows.pt"])
def test_a_reader_refuses_a_pickle_as_data(
    srcfast: Srcfast, tmp_path: Path, witness: Path, format: str, form: str
) -> None:
    (tmp_path / form).write_bytes(bomb(form, witness))
    result = srcfast("convert", tmp_path / form, tmp_path / "out.jsonl", "--from", format, "--to", "jsonl")
    assert result.exit_code == 2, (result.output, result.exception)
    assert not witness.exists() and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
def test_yaml_makes_no_objects(srcfast: Srcfast, tmp_path: Path, witness: Path, tag: str) -> None:
    evil = f"name: {tag} ['touch {witness}']\n"
    config = tmp_path / "config.yaml"
    config.write_text(evil)
    assert srcfast("estimate", config).exit_code == 2
    assert srcfast("estimate", f"name={tag} ['touch {witness}']").exit_code == 2
    (tmp_path / "summary.json").write_text("{}")
    assert srcfast("report", tmp_path).exit_code == 2  # reads the run's config.yaml
    assert not witness.exists()
