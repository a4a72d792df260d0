"""Numbers that are not finite end a command by name, wherever a model's numbers are read; none is counted or written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.made_rows import write_rows
from safetensors.torch import load_file, save_file

from srcfast.config.settings import LoRAConfig, ScorerConfig
from srcfast.data.records import Candidate, Sample
from srcfast.errors import InputError
from srcfast.models import load_lvlm
from srcfast.models.lora import lora_parameters, save_adapter
from srcfast.models.scorer import load_scorer
from srcfast.stages.adaptive_pairs import AdaptivePairs
from srcfast.stages.scoring import score_candidates

Srcfast = Callable[..., Result]
ASSETS = Path(__file__).parents[3] / "srcfast" / "world" / "assets"
ROW = {"id": "row-7", "images": ["a.png"], "question": "what color", "answer": "red"}


def scaled_adapter(base: str | Path, directory: Path, factor: float) -> Path:
    """An adapter of random weights, times a factor, stored in bfloat16, which holds it."""
    model = load_lvlm(base, lora=LoRAConfig(r=2, alpha=4.0))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * factor)
    save_adapter(model, directory)
    file = directory / "adapter_model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    save_file(tensors, file)
    return directory


def options(data: Path, image_root: Path, output: Path) -> tuple[Any, ...]:
    return ("--data", data, "--image-root", image_root, "--output", output, "--quiet")


def outputs(directory: Path) -> list[Path]:
    return (
        [*directory.rglob("*.jsonl"), *directory.rglob("summary.json")]
        if directory.is_dir()
        else [*directory.parent.glob(directory.name)]
    )


@pytest.mark.parametrize("factor", [1e19, 1e30])
@pytest.mark.parametrize("command", ["evaluate", "candidates", "logprob"])
def test_an_adapter_that_overflows_is_named_with_model_and_sample(
    srcfast: Srcfast, image_root: Path, tmp_path: Path, command: str, factor: float
) -> None:
    adapter = scaled_adapter("embedded", tmp_path / "adapter", factor)
    row: dict[str, Any] = (
        ROW if command != "logprob" else {"id": "row-7", "images": ["a.png"], "prompt": "what", "response": "red"}
    )
    data = write_rows(tmp_path / "rows.jsonl", [row])
    result = srcfast(command, "--adapter", adapter, *options(data, image_root, tmp_path / "out"))
    assert result.exit_code == 2 and "Traceback" not in result.output, (result.output, result.exception)
    sample = "'request 1'" if command == "logprob" else "'row-7'"  # whose requests have no ids
    for word in ("finite numbers", str(adapter), sample, str(ASSETS / "base"), "Fix: "):
        assert word in result.output
    assert not outputs(tmp_path / "out")


@pytest.mark.parametrize("mode", ["pairwise", "independent", "adaptive"])
def test_an_r_scorer_that_overflows_is_named_with_the_sample(tmp_path: Path, mode: str) -> None:
    directory = Path(shutil.copytree(ASSETS / "scorer", tmp_path / "scorer"))
    file = directory / "model.safetensors"
    tensors = load_file(file)
    norm = next(name for name in tensors if name.endswith("model.norm.weight"))
    tensors[norm] = torch.full_like(tensors[norm], 3e38)  # finite, as a checkpoint's weights have to be
    save_file(tensors, file)
    scorer = load_scorer(directory)
    samples = [Sample(id=f"row-{n}", images=(), question="what", answer="red", image_root=tmp_path) for n in (3, 4)]
    candidates = {
        sample.id: [
            Candidate(
                id=f"{sample.id}#{n}",
                sample_id=sample.id,
                text=text,
                rationale=text,
                answer=text,
                logprob=-1.0,
                token_ids=(5,),
            )
            for n, text in enumerate(("red", "blue", "a red one", "green", "no"))
        ]
        for sample in samples
    }
    adaptive = AdaptivePairs(ScorerConfig(adaptive_audit=0.0)) if mode == "adaptive" else None
    with pytest.raises(InputError, match=r"sample 'row-3', field 'verdicts': expected finite numbers.*Fix") as error:
        score_candidates(
            scorer, samples, candidates, 4096, "independent" if mode == "independent" else "pairwise", adaptive=adaptive
        )
    assert str(directory) in str(error.value)


def test_a_model_that_overflows_without_an_adapter_is_named(srcfast: Srcfast, image_root: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(ASSETS / "base", tmp_path / "base"))
    tensors = load_file(directory / "model.safetensors")
    norm = next(name for name in tensors if name.endswith("language_model.norm.weight"))
    tensors[norm] = torch.full_like(tensors[norm], 3e38)
    save_file(tensors, directory / "model.safetensors")
    data = write_rows(tmp_path / "rows.jsonl", [ROW])
    result = srcfast("evaluate", "--model", directory, *options(data, image_root, tmp_path / "out"))
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert str(directory) in result.output and "'row-7'" in result.output and "finite numbers" in result.output
    assert "adapter" not in result.output and not outputs(tmp_path / "out")
