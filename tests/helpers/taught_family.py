"""A family's small checkpoint that has learnt to answer in the format of rationales, and questions about random images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from helpers.families import write_family
from helpers.family_models import documented_processor
from helpers.small_checkpoints import random_image
from srcfast.cli.app import app
from srcfast.config.settings import RationaleConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.jsonl import read_jsonl
from srcfast.data.rationale_pairs import build_raps
from srcfast.data.readers import read_samples
from srcfast.models import load_lvlm
from srcfast.models.checkpoint import read_config
from srcfast.models.lvlm import save_lvlm

SIZES = ((70, 40), (33, 33), (20, 60))  # width, height


SETTINGS = """
name: small
iterations: 1
quiet: true
threads: 1
scorer: {path: embedded, token_budget: 32768}
lora: {r: 32, alpha: 32}
rationale: {epochs: 4, micro_batch_size: 12, gradient_accumulation_steps: 1, learning_rate: 1.0e-3}
candidates:
  num_candidates: 3
  num_beams: 3
  proposals: 2
  max_sentences: 6
  max_sentence_tokens: 40
  max_new_tokens: 90
  batch_size: 8
  temperature: 0.7
curation: {min_margin: 0.0, min_confidence: 0.0, max_length_ratio: 100, pairing: random}
dpo: {epochs: 1, micro_batch_size: 4, gradient_accumulation_steps: 1, learning_rate: 1.0e-3}
evaluation: {max_new_tokens: 90, headroom_samples: 4, bootstrap_resamples: 100}
"""


class TaughtFamily:
    """A family's checkpoint that answers as a calibration needs it, questions about images, and runs by their names."""

    def __init__(self, name: str, directory: Path, in_conversations: bool = False) -> None:
        self.directory, self.base = directory, directory / "base"
        self.questions = write_questions(directory / "data", in_conversations=in_conversations)
        self.base.mkdir()
        write_taught_family(name, self.base, self.questions)
        self.processor = documented_processor(self.base, read_config(self.base).model_type)
        self.config = directory / "config.yaml"
        data = {
            "train": [{"name": "colours", "format": "jsonl", "path": str(self.questions)}],
            "evaluation": [{"name": "world", "format": "world", "split": "test", "limit": 6}],
        }
        sections = {"model": {"path": str(self.base)}, "data": data}
        lines = [f"{key}: {json.dumps(value)}\n" for key, value in sections.items()]
        self.config.write_text(SETTINGS + "".join(lines), encoding="utf-8")
        self.runs: dict[str, Path] = {}

    def calibrate(self, name: str, *words: str) -> Path:
        """Run `srcfast calibrate` in this process; returns the run's directory."""
        command = ["calibrate", str(self.config), f"output={self.directory / name}", *words]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output[-3000:]
        self.runs[name] = self.directory / name / "small"
        return self.runs[name]


def rows(directory: Path) -> list[dict[str, Any]]:
    """The records of a directory's files."""
    return [row for file in sorted(directory.glob("*.jsonl")) for _, row in read_jsonl(file)]


def write_questions(directory: Path, count: int = 12, in_conversations: bool = False) -> Path:
    """Write samples with an image each, or about the second of two images after a system text and a turn; returns the file."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        random_image(rng, *SIZES[number % 3]).save(directory / f"{number}.png")
        answer = ("red", "blue")[number % 2]
        facts = ["It is a thing.", f"It is {answer}."]
        row = {
            "id": str(number),
            "image": f"{number}.png",
            "question": "what color is it?",
            "answer": answer,
            "facts": facts,
        }
        if in_conversations:
            texts = {"system": "be brief.", "user": "<image> is one.", "assistant": "yes."}
            row["turns"] = [{"role": role, "content": text} for role, text in texts.items()]
            row |= {"image": [f"{(number + 1) % count}.png", f"{number}.png"], "question": "what color is <image>?"}
        rows.append(row)
    file = directory / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_taught_family(name: str, directory: Path, questions: Path, steps: int = 150) -> None:
    """Write the checkpoint, its language model trained on some of the questions' images and rationales."""
    write_family(name, directory)
    ours: Any = load_lvlm(directory, backbone="transformers")
    samples = read_samples(questions, format="jsonl", image_root=questions.parent, rejected=[])
    pairs, _ = build_raps(samples[:4], RationaleConfig().format)
    trees, images = [], {}
    for sample, response in pairs:
        shown = {name: Image.open(questions.parent / name).convert("RGB") for name in sample.images}
        images |= shown
        prompt = ours.encode_prompt(sample.question, [*shown.values()], sample.id, sample.turns)
        # Both colours alike, so that candidates differ.
        texts = [response.replace("red", colour).replace("blue", colour) for colour in ("red", "blue")]
        answers = [Segment(ours.encode_response(text), 0) for text in texts]
        trees.append(Tree((Segment(prompt), *answers), sample.images))
    forest = Forest.of(trees)
    features = dict(zip(images, ours.encode_images(list(images.values())), strict=True))
    rows, targets = (torch.cat(parts) for parts in zip(*(forest.target_rows(n, [1, 2]) for n in range(4)), strict=True))
    trained = [*ours.decoder.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=4e-3, weight_decay=0.0)
    for _ in range(steps):
        logits = ours.decoder.head.capped(ours(forest, features)[rows] @ ours.decoder.head_weight.T)
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    assert float(loss) < 0.3, f"the model has learnt little: {float(loss)}"
    save_lvlm(ours, directory)
