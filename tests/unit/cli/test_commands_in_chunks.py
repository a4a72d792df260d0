"""Commands run a model over pieces that are kept until the result is on disk, and read no file more often than needed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.made_rows import preference_rows, sentence, write_rows
from PIL import Image
from safetensors.torch import load_file

from srcfast.cli import commands, inputs
from srcfast.config.settings import LoRAConfig
from srcfast.data.jsonl import read_shards, write_shards
from srcfast.models import load_lvlm
from srcfast.models.lora import lora_parameters, save_adapter
from srcfast.stages import dpo as preference
from srcfast.stages import logprobs

Srcfast = Callable[..., Result]


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the power is gone")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "PAIRS", 3)


@pytest.mark.usefixtures("small_pieces")
def test_references_that_dpo_has_computed_outlast_a_training_that_fails(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows(7, seed=1))
    words = ["dpo", "--model", model_dir, "--data", data, "--image-root", image_root, "--quiet", "lora.r=4"]
    assert srcfast(*words, "--output", tmp_path / "whole").exit_code == 0
    output = tmp_path / "stopped"
    with monkeypatch.context() as fault:
        fault.setattr(preference, "train", broken)
        assert "the power is gone" in str(srcfast(*words, "--output", output).exception)
    kept = sorted((output / "checkpoint" / "references").rglob("*.jsonl"))
    assert [file.name for file in kept] == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
    kept[1].unlink()
    computed: list[int] = []
    exact = logprobs.reference_logprobs

    def counted(model: Any, pairs: Any, **options: Any) -> Any:
        computed.append(len(pairs))
        return exact(model, pairs, **options)

    monkeypatch.setattr(logprobs, "reference_logprobs", counted)
    assert srcfast(*words, "--output", output).exit_code == 0
    assert computed == [3]  # the missing part's pairs, and no others
    found, expected = (load_file(one / "adapter_model.safetensors") for one in (output, tmp_path / "whole"))
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert json.loads((output / "summary.json").read_text())["references_computed"] == 7
    assert not (output / "checkpoint").exists()


@pytest.fixture
def own_images(image_root: Path, tmp_path: Path) -> Path:
    """A copy of the images, to change."""
    return Path(shutil.copytree(image_root, tmp_path / "images"))


@pytest.mark.usefixtures("small_pieces")
def test_kept_references_are_used_for_the_same_images_and_budget_whatever_the_training_s_settings(
    srcfast: Srcfast, model_dir: Path, own_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows(4, seed=2))
    words = ["dpo", "--model", model_dir, "--data", data, "--output", tmp_path / "out", "--quiet"]
    computed: list[int] = []
    exact = logprobs.reference_logprobs

    def counted(model: Any, pairs: Any, **options: Any) -> Any:
        computed.append(len(pairs))
        return exact(model, pairs, **options)

    monkeypatch.setattr(logprobs, "reference_logprobs", counted)
    monkeypatch.setattr(preference, "train", broken)

    def of_a_run(*more: object) -> list[int]:
        computed.clear()
        assert "the power is gone" in str(srcfast(*words, *more).exception)
        return [*computed]

    assert of_a_run("--image-root", own_images) == [3, 1]
    assert of_a_run("--image-root", own_images, "learning_rate=0.01", "beta=0.3") == []
    moved = own_images.rename(tmp_path / "moved")
    assert of_a_run("--image-root", moved) == []
    for file in moved.iterdir():  # others under the same names
        Image.new("RGB", (50, 50), "red").save(file)
    with pytest.warns(RuntimeWarning, match="done again"):
        assert of_a_run("--image-root", moved) == [3, 1]
    with pytest.warns(RuntimeWarning, match="done again"):
        assert of_a_run("--image-root", moved, "token_budget=300") == [3, 1]


@pytest.mark.usefixtures("small_pieces")
def test_logprob_s_kept_parts_are_not_used_for_other_images_under_the_same_names(
    srcfast: Srcfast, model_dir: Path, own_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"images": ["a.png"], "prompt": "what color", "response": "red" + " two" * n} for n in range(4)]
    data, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    words = ["logprob", "--model", model_dir, "--data", data, "--image-root", own_images, "--quiet"]
    with monkeypatch.context() as fault:
        fault.setattr(commands, "write_jsonl", broken)
        assert "the power is gone" in str(srcfast(*words, "--output", out).exception)
    Image.new("RGB", (50, 50), "red").save(own_images / "a.png")
    with pytest.warns(RuntimeWarning, match="done again"):
        assert srcfast(*words, "--output", out).exit_code == 0
    assert srcfast(*words, "--output", tmp_path / "whole.jsonl").exit_code == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.usefixtures("small_pieces")
def test_logprob_goes_on_behind_its_last_finished_part_and_leaves_nothing_beside_its_output(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(6)
    rows = [
        {"images": [f"{'abc'[n % 3]}.png"], "prompt": "what color", "response": sentence(rng, n + 1)} for n in range(8)
    ]
    data = write_rows(tmp_path / "in.jsonl", rows)
    words = ["logprob", "--model", model_dir, "--data", data, "--image-root", image_root, "--quiet"]
    assert srcfast(*words, "--output", tmp_path / "whole.jsonl").exit_code == 0
    exact, sizes, out = logprobs.response_logprobs, [], tmp_path / "out.jsonl"

    def counted(model: Any, items: Any, **options: Any) -> Any:
        sizes.append(len(items))
        return broken() if sizes == [3, 3] else exact(model, items, **options)

    monkeypatch.setattr(logprobs, "response_logprobs", counted)
    assert "the power is gone" in str(srcfast(*words, "--output", out).exception)
    assert not out.exists()
    sizes[:] = [0]
    assert srcfast(*words, "--output", out).exit_code == 0
    assert sizes == [0, 3, 2]  # the second and the third part
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and len(out.read_text().splitlines()) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_answers_of_another_adapter_are_not_taken_for_finished(
    srcfast: Srcfast, model_dir: Path, image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_lvlm(model_dir, lora=LoRAConfig(r=8, alpha=64.0))
    for number, parameter in enumerate(lora_parameters(model)):
        generator = torch.Generator().manual_seed(number)
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    save_adapter(model, tmp_path / "adapter")
    rows = [{"id": f"{n}", "image": f"{'abc'[n % 3]}.png", "question": "what", "answer": "red"} for n in range(3)]
    data = write_rows(tmp_path / "samples.jsonl", rows)
    words = [
        "evaluate",
        "--model",
        model_dir,
        "--data",
        data,
        "--image-root",
        image_root,
        "--quiet",
        "max_new_tokens=5",
    ]
    adapted = (*words, "--adapter", tmp_path / "adapter")
    with monkeypatch.context() as fault:
        fault.setattr(commands, "write_evaluation", broken)
        assert "the power is gone" in str(srcfast(*words, "--output", tmp_path / "out").exception)
    with pytest.warns(RuntimeWarning, match="done again"):
        assert srcfast(*adapted, "--output", tmp_path / "out").exit_code == 0
    for name, command in (("base", words), ("whole", adapted)):
        assert srcfast(*command, "--output", tmp_path / name).exit_code == 0
    answers = {}
    for name in ("out", "whole", "base"):
        (file,) = (tmp_path / name / "predictions").glob("*.jsonl")
        answers[name] = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert answers["out"] == answers["whole"] != answers["base"]


def test_score_reads_the_candidates_three_times_and_says_how_many_samples_have_some(
    srcfast: Srcfast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [
        {"id": f"s{n}", "question": "How many?", "answer": "2", "facts": ["There is a red circle."]} for n in range(5)
    ]
    data = write_rows(tmp_path / "samples.jsonl", samples)
    texts = ["Red. Answer: 2", "Green. Answer: 3"]
    rows = [
        {"id": f"s{n}/{k}", "sample_id": f"s{n}", "text": text, "logprob": -1.0}
        for n in (1, 3, 4)
        for k, text in enumerate(texts)
    ]
    write_shards(tmp_path / "candidates", rows)
    read: list[Path] = []

    def counted(directory: Path) -> Any:
        read.append(directory)
        return read_shards(directory)

    monkeypatch.setattr(inputs, "read_shards", counted)
    words = ["--data", data, "--candidates", tmp_path / "candidates", "--output", tmp_path / "scores"]
    result = srcfast("score", *words, "scorer.path=embedded")
    assert result.exit_code == 0, result.output
    assert read == [tmp_path / "candidates"] * 3  # to see whether they fit, to list and hash them, to score them
    assert "3/3 samples" in result.output
    assert [row["sample_id"] for *_, row in read_shards(tmp_path / "scores")] == ["s1", "s3", "s4"]
