"""The recipe of a base that sees all families: labels and texts by hand, a few steps of it, stopped and continued."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.seeds import fresh_rng

from srcfast.data.rationale_format import ParsedResponse
from srcfast.data.records import Sample
from srcfast.errors import SrcfastError
from srcfast.generation.generate import Prompt, generate_greedy
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.recipes.base_checkpoint import new_lvlm, take_decoder, train_tokenizer
from srcfast.recipes.families import CLASSES, by_images, caption, labels_of, perceptions, read_family
from srcfast.recipes.families_base import RECIPES, Recipe, train_base
from srcfast.recipes.language import Writer
from srcfast.recipes.unfinished import Unfinished, check_recipe
from srcfast.stages.prompts import encode_prompt, image_keys, image_loader
from srcfast.world.verification import verify_sample


def drawn(name: str, count: int, directory: Path) -> list[Sample]:
    return read_family(name, count, int(fresh_rng().integers(1 << 30)), directory)


def column(name: str) -> int:
    return list(CLASSES).index(name)


def test_the_base_loads_and_answers(base: Path, small: Recipe, tmp_path: Path) -> None:
    model = load_lvlm(base)
    assert type(model).__name__ == "LVLM"
    samples = [drawn(name, 3, tmp_path)[0] for name in small.samples]
    prompts = [Prompt(encode_prompt(model, sample), image_keys(sample), sample.id) for sample in samples]
    for sample, prompt in zip(samples, prompts, strict=True):
        assert (prompt.token_ids == model.image_token_id).sum() == 81 * len(sample.images)
    responses = generate_greedy(model, prompts, ImageFeatures(model, image_loader(samples)), 5, batch_size=2)
    assert all(1 <= len(response.token_ids) <= 5 for response in responses)


def test_the_training_is_on_the_prompts_that_the_template_writes(base: Path, small: Recipe, tmp_path: Path) -> None:
    model = load_lvlm(base)
    writer = Writer(model.tokenizer, 81)
    for name in small.samples:
        sample = drawn(name, 3, tmp_path)[0]
        trained = [*writer.image_root(len(sample.images)), *writer.question(sample.question)]
        assert encode_prompt(model, sample).tolist() == trained
        text = replace(sample, question=" ".join([*sample.facts, sample.question]), images=())
        assert encode_prompt(model, text).tolist() == [
            *writer.text_root(sample.facts),
            *writer.question(f" {sample.question}"),
        ]


def test_the_record_has_each_family(base: Path, small: Recipe) -> None:
    record = json.loads((base / "TRAINING.json").read_text(encoding="utf-8"))
    for key in ("tower_accuracy", "short_answer_accuracy", "text_accuracy"):
        assert list(record[key]) == list(small.samples)
    assert record["recipe"]["language"]["steps"] == 3


@pytest.mark.parametrize("stage", ["tower", "language", "reasoning"])
def test_a_stopped_training_continues_to_the_same_bytes(
    base: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    save = Unfinished.save_if_due

    def stopping(self: Unfinished, optimizer: torch.optim.Optimizer, steps: int) -> None:
        save(self, optimizer, steps)
        if self.file.name == f"{stage}.safetensors" and self.file.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(Unfinished, "save_if_due", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_base(tmp_path, small, minutes=0.0)
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    train_base(tmp_path, small)
    assert (tmp_path / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert not list((tmp_path / "work").glob("*.safetensors"))


def test_a_base_continues_from_another_with_its_tower(base: Path, small: Recipe, tmp_path: Path) -> None:
    longer = replace(small, seed=5, validation_samples=3)
    train_base(tmp_path / "longer", longer, start=base)
    earlier, later = load_lvlm(base).state_dict(), load_lvlm(tmp_path / "longer").state_dict()
    for name, weights in later.items():  # in three steps a norm may stay what it is in bf16
        assert torch.equal(weights, earlier[name]) == ("vision_tower" in name) or "norm" in name
    record = json.loads((tmp_path / "longer" / "TRAINING.json").read_text(encoding="utf-8"))
    assert record["start"] == json.loads((base / "TRAINING.json").read_text(encoding="utf-8"))
    assert record["recipe"]["seed"] == 5 and record["tower_accuracy"] == record["start"]["tower_accuracy"]
    assert "start" not in record["start"] and not (tmp_path / "longer" / "work" / "tower").exists()
    with pytest.raises(SrcfastError, match="another recipe"):
        train_base(tmp_path / "longer", longer)


def test_weights_and_moments_are_restored(tmp_path: Path) -> None:
    def training() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(1)
        linear = torch.nn.Linear(5, 3)
        return linear, torch.optim.AdamW(linear.parameters(), lr=0.1, betas=(0.9, 0.98))

    def step(linear: torch.nn.Linear, optimizer: torch.optim.AdamW, x: torch.Tensor) -> None:
        optimizer.zero_grad()
        linear(x).square().sum().backward()
        optimizer.step()

    inputs = torch.randn(5, 4, 5)
    whole, optimizer = training()
    for x in inputs:
        step(whole, optimizer, x)
    begun, optimizer = training()
    for x in inputs[:3]:
        step(begun, optimizer, x)
    Unfinished(tmp_path / "t.safetensors", minutes=1e9).save_if_due(optimizer, 3)
    assert Unfinished(tmp_path / "t.safetensors").load(training()[1]) == 0  # it was not due
    Unfinished(tmp_path / "t.safetensors", minutes=0.0).save_if_due(optimizer, 3)
    continued, optimizer = training()
    assert Unfinished(tmp_path / "t.safetensors").load(optimizer) == 3
    for x in inputs[3:]:
        step(continued, optimizer, x)
    assert torch.equal(continued.weight, whole.weight)
    assert torch.equal(continued.bias, whole.bias)


def test_the_work_of_another_recipe_is_refused(tmp_path: Path) -> None:
    check_recipe(tmp_path, {"seed": 0, "sizes": (1, 2)})
    check_recipe(tmp_path, {"seed": 0, "sizes": (1, 2)})
    with pytest.raises(SrcfastError, match="another recipe"):
        check_recipe(tmp_path, {"seed": 1, "sizes": (1, 2)})


def test_sizes() -> None:
    """The numbers of weights that the names of the recipes promise, counted by hand."""

    def weights(recipe: Recipe) -> int:
        d, v = recipe.hidden_size, recipe.vision_size
        decoder = recipe.num_layers * (4 * d * d + 9 * d * d) + 2 * recipe.vocabulary_size * d
        return decoder + recipe.vision_layers * 10 * v * v + v * d + d * d

    assert 1.5e6 < weights(RECIPES["2m"]) < 2.5e6
    assert 20e6 < weights(RECIPES["25m"]) < 30e6


# --- Labels -------------------------------------------------------------------------------------------------


def made(extra: dict[str, Any]) -> Sample:
    return Sample(id="1", images=("1.png",), question="?", answer="a", facts=("A fact.",), extra=extra)


def labels(extra: dict[str, Any], pixels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.zeros((144, 144, 3), dtype=np.uint8) if pixels is None else pixels
    patches, image = labels_of(made(extra), 0, pixels)
    return patches.reshape(9, 9, -1), image


def test_labels_of_a_mosaic() -> None:
    patches, image = labels({"numbers": {"values": {"top right": 7, "center": 0}}})
    digit = patches[..., column("digit")]
    assert (digit[:3, 6:] == 8).all()
    assert (digit[3:6, 3:6] == 1).all()
    assert (digit > 0).sum() == 18
    assert (patches[:3, :3, column("place")] == 0).all()
    assert (patches[6:, 6:, column("place")] == 8).all()
    assert (patches[..., column("shape")] == -100).all()
    assert (image == -100).all()


def test_labels_of_a_chart() -> None:
    numbers = {"values": {"A": 10, "B": 37, "C": 50}, "categories": {"A": "x", "B": "y", "C": "z"}, "axis": 50}
    patches, _ = labels({"numbers": numbers})
    # Three bars: the axes run from pixel 25.92 over 113.76 pixels, for -0.6 to 2.6. Middles at 47.25, 82.8 and 118.35.
    bars = [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert (patches[..., column("bar")] == bars).all()
    shown = {0: (-100, -100, -100), 1: (10, 1, 0), 2: (37, 3, 7), 3: (50, 5, 0)}
    for name, index in (("height", 0), ("tens", 1), ("ones", 2)):
        assert (patches[..., column(name)] == [shown[bar][index] for bar in bars]).all()
    assert (patches[..., column("axis")] == 2).all()


def test_values_of_a_chart_to_ten_are_labelled_in_tenths() -> None:
    numbers = {"values": {"A": 9.7, "B": 0.4, "C": 10}, "categories": {}, "axis": 10}
    patches, _ = labels({"numbers": numbers})
    assert patches[4, [2, 4, 7], column("tens")].tolist() == [9, 0, 10]
    assert patches[4, [2, 4, 7], column("ones")].tolist() == [7, 4, 0]


def test_labels_of_a_frame() -> None:
    star = {"shape": "star", "color": "teal", "size": "large", "place": "bottom left"}
    frames = [{"objects": [], "background": "plain"}, {"objects": [star], "background": "dotted"}]
    sample = made({"clip": frames})
    pixels = np.zeros((72, 72, 3), dtype=np.uint8)
    assert (labels_of(sample, 0, pixels)[0][:, :3] == 0).all()
    patches, image = labels_of(sample, 1, pixels)
    assert (patches.reshape(9, 9, -1)[6:, :3, :3] == (4, 8, 2)).all()
    assert (patches[:, 0] > 0).sum() == 9
    assert image.tolist() == [2, -100, -100]


def test_labels_of_easy_vqa_are_where_the_object_is() -> None:
    pixels = np.full((64, 64, 3), 230, dtype=np.uint8)
    pixels[:22, 8:32] = (0, 0, 255)  # patches of 64/9 pixels: rows 0 to 2 and an edge in row 3, columns 1 to 4
    extra = {"scene": {"objects": [{"shape": "rectangle", "color": None, "size": None, "place": None}]}}
    patches, image = labels(extra, pixels)
    assert image.tolist() == [-100, 1, -100]
    assert (patches[:3, 2:4, column("shape")] == 2).all()
    assert (patches[:3, 2:4, column("color")] == -100).all()  # it is not known
    assert (patches[3, 2:4, column("shape")] == -100).all()
    assert (patches[5:, :, column("shape")] == 0).all()
    assert (patches[:, 6:, column("color")] == 0).all()
    assert (patches[..., column("place")] == -100).all()


# --- Texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["world", "clips", "easy_vqa"])
def test_captions_and_perceptions_are_true(name: str, tmp_path: Path) -> None:
    rng = random.Random(int(fresh_rng().integers(1 << 30)))
    for sample in drawn(name, 20, tmp_path):
        for _, answer in [caption(sample), *perceptions(sample, rng, 8)]:
            sentences = [f"{part.removesuffix('.')}." for part in answer.split(". ")]
            if answer.startswith("At the") or "no object" in answer:
                continue  # a place is no sentence of the grammar; of a cell or a side that is empty, not of the image
            verification = verify_sample(sample, ParsedResponse(tuple(sentences), (), sample.answer))
            assert verification is not None
            assert {verdict for _, _, verdict in verification.claims} == {"true"}, answer


def test_perceptions_of_numbers_are_facts() -> None:
    sample = replace(
        made({"numbers": {"values": {"top": 3, "left": 8}}}),
        facts=("The digit at the top is 3.", "The digit at the left is 8."),
    )
    asked = dict(perceptions(sample, random.Random(0), 40))
    assert asked == {
        "What is at the top?": "The digit at the top is 3.",
        "What is at the left?": "The digit at the left is 8.",
    }
    chart = replace(made({"numbers": {"values": {"A": 3}, "axis": 10}}), facts=("A is 3.",))
    assert perceptions(chart, random.Random(0), 1) == [("What is A?", "A is 3.")]


def test_samples_of_the_same_images_are_one_picture(tmp_path: Path) -> None:
    samples = drawn("world", 20, tmp_path)
    pictures = by_images(samples)
    assert sorted(sample.id for picture in pictures for sample in picture) == sorted(sample.id for sample in samples)
    assert len(pictures) == len({sample.images for sample in samples})
    assert all(len({sample.images for sample in picture}) == 1 for picture in pictures)


def test_each_digit_is_a_token() -> None:
    tokenizer = train_tokenizer(["There are 34 of 3456, 34, 34 and 12.5."] * 4, 400, single_digits=True)
    tokens = tokenizer.tokenize("There are 3456 or 12.5.")
    assert [token for token in tokens if any(c.isdigit() for c in token)] == ["Ġ3", "4", "5", "6", "Ġ1", "2", "5"]
    assert tokenizer.decode(tokenizer("There are 3456 or 12.5.").input_ids) == " There are 3456 or 12.5."


def test_a_decoder_is_copied_by_token(base: Path, tmp_path: Path) -> None:
    source = load_lvlm("embedded")
    texts = ["USER: Is there a red square at the left? ASSISTANT: yes 12"] * 9
    tokenizer = train_tokenizer(texts, 320, single_digits=True)
    new_lvlm(tmp_path, tokenizer, hidden_size=128, num_layers=5, vision_layers=1, seed=int(fresh_rng().integers(99)))
    model = load_lvlm(tmp_path)
    take_decoder(model, source)
    theirs, ours = source.decoder.state_dict(), model.decoder.state_dict()
    embedding, copied = theirs["embed_tokens.weight"], ours["embed_tokens.weight"]
    known = source.tokenizer.get_vocab()
    shared = {token: index for token, index in tokenizer.get_vocab().items() if token in known}
    assert {"<image>", "</s>", "e"} <= shared.keys()
    for token, index in shared.items():
        assert torch.equal(copied[index], embedding[known[token]]), token
    # A word that the source's tokenizer splits: the mean of its parts.
    for index in (index for token, index in tokenizer.get_vocab().items() if token not in known and token.isascii()):
        parts = source.tokenizer(model.decode([index]), add_special_tokens=False).input_ids
        torch.testing.assert_close(copied[index], embedding[parts].mean(0))
    others = [name for name in theirs if theirs[name].shape[0] != len(known)]
    assert others and all(torch.equal(ours[name], theirs[name]) for name in others)
