"""The page on serving: its snippets are run, its commands of srcfast exist, and what it says of adapters is so."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from PIL import Image

from srcfast.cli.app import app
from srcfast.config.settings import Config, LoRAConfig
from srcfast.data.records import Sample
from srcfast.models import load_lvlm
from srcfast.models.embedded import checkpoint_directory
from srcfast.models.lora import lora_parameters, save_adapter
from srcfast.stages.evaluation import answer_greedily
from srcfast.stages.policy import features_of, load_model
from srcfast.world.samples import world_samples

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
QUESTION = "How many people wear a helmet?"
TOKENS = 8  # random weights make near ties, of which rounding picks another one sooner or later


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the embedded base that changes its answers, base and adapter merged by the command, and a photo."""
    folder = tmp_path_factory.mktemp("served")
    model = load_lvlm(checkpoint_directory("embedded", "base"), lora=LoRAConfig(r=4, alpha=8.0).seeded(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder / "adapter")
    words = ["merge", "--model", "embedded", "--adapter", str(folder / "adapter"), "--output", str(folder / "merged")]
    words.append("model.dtype=float32")  # the base is stored in bf16, in which transformers would then compute
    subprocess.run([sys.executable, "-m", "srcfast", *words], check=True, capture_output=True, timeout=600)
    [sample] = world_samples("test", 1, 0, image_dir=folder)
    Image.open(folder / sample.images[0]).save(folder / "photo.png")
    return folder


def said_by_srcfast(folder: Path, model: str, adapter: Path | None) -> str:
    config = Config.model_validate({"model": {"path": model}})
    lvlm = load_model(config, adapter)
    sample = Sample("question", ("photo.png",), QUESTION, "", image_root=folder)
    [prediction] = answer_greedily(lvlm, [sample], features_of(lvlm, [sample]), TOKENS, batch_size=1)
    return prediction.text


def run(code: str, folder: Path) -> str:
    """What code of the page prints, with this test's paths and fewer tokens."""
    names = {
        "/models/llava-1.5-7b-hf": checkpoint_directory("embedded", "base"),
        "runs/street/iteration-2/adapter": folder / "adapter",
        "/models/street": folder / "merged",
        "photo.png": folder / "photo.png",
        "max_new_tokens=256": f"max_new_tokens={TOKENS}",
    }
    for name, ours in names.items():
        code = code.replace(name, str(ours))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


def test_transformers_answers_as_srcfast_does(folder: Path) -> None:
    adapted = said_by_srcfast(folder, "embedded", folder / "adapter")
    assert adapted != said_by_srcfast(folder, "embedded", None)
    assert said_by_srcfast(folder, str(folder / "merged"), None) == adapted
    # A special token's space is the tokenizer's.
    assert run(PYTHON[0], folder).strip() == adapted.strip() != ""


def test_peft_answers_as_srcfast_does(folder: Path) -> None:
    pytest.importorskip("peft")
    imports, rest = PYTHON[0].split("\n\n", 1)
    rest = "\n".join(line for line in rest.splitlines() if not line.startswith("model = "))
    rest = rest.replace("/models/street", "/models/llava-1.5-7b-hf")  # the processor is the base's
    said = run(f"{imports}\n{PYTHON[1]}\n{rest}", folder)
    assert said.strip() == said_by_srcfast(folder, "embedded", folder / "adapter").strip()


def test_each_python_block_is_run() -> None:
    assert len(PYTHON) == 2


def test_the_commands_of_srcfast_exist_with_their_options() -> None:
    lines = [line for language, text in BLOCKS if not language for line in text.replace("\\\n", " ").splitlines()]
    ours = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("srcfast ")]
    assert [words[0] for words in ours] == ["merge", "chat"]
    for command, *words in ours:
        known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
    named = set(re.findall(r"`srcfast (\w+)", PAGE)) | set(re.findall(r"`(rationale|dpo)`", PAGE))
    assert named <= set(COMMANDS)


def test_the_config_of_vllm_says_what_its_command_says() -> None:
    [text] = [text for language, text in BLOCKS if language == "yaml"]
    settings = yaml.safe_load(text)
    [command] = re.findall(r"^vllm serve (\S+) (--enable-lora .*?)\nvllm", PAGE, re.MULTILINE | re.DOTALL)
    options = shlex.split(command[1].replace("\\\n", " "))
    assert settings.pop("model") == command[0]
    assert options == [
        "--enable-lora", "--max-lora-rank", str(settings["max-lora-rank"]), "--lora-modules", *settings["lora-modules"],
    ]  # fmt: skip
