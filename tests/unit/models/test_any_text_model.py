"""Causal language models of transformers that the hand-written decoder does not have: on the forest, saved, and as R-Scorers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from helpers.families import randomise
from helpers.gemma_families import layers_of
from helpers.small_checkpoints import assert_close

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.logit_rows import response_logit_rows
from srcfast.errors import InputError
from srcfast.models.scorer import load_scorer
from srcfast.models.text_model import load_text_model, save_text_model
from srcfast.models.transformers_decoder import TransformersDecoder
from srcfast.world.oracle import __file__ as WORLD

SCORER = Path(WORLD).parent / "assets" / "scorer"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
EXPERTS = {"head_dim": 16, "num_experts_per_tok": 2}
GEMMA4: dict[str, Any] = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 3.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "phi3": {},
    "smollm3": {},
    "starcoder2": {},
    "gemma": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, **EXPERTS},
    "qwen3_5_text": {"head_dim": 32, "layer_types": ["linear_attention"] * 3 + ["full_attention"], **DELTA},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **layers_of(12)},
    "gemma3_text": {"head_dim": 16, **layers_of(12)},
    "gemma4_text": {**GEMMA4, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2},
    "cohere2": {"logit_scale": 0.25, **layers_of(12)},
    "mistral": {"sliding_window": 12},
    "exaone4": {"sliding_window_pattern": "LLLG", **layers_of(12)},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt_oss": ({"num_local_experts": 4, **EXPERTS}, "logits that differ by"),
    "stablelm": ({}, "stablelm"),
}
ROUNDING = 5e-5  # fp32 sums in another order over four layers, of the largest logit


def write(name: str, options: dict[str, Any], directory: Path) -> Any:
    """Write a small random checkpoint with the embedded R-Scorer's tokenizer; return the model."""
    tokenizer = tf.AutoTokenizer.from_pretrained(SCORER)
    config = tf.AutoConfig.for_model(name, vocab_size=len(tokenizer), **{**SIZES, **options})
    model = tf.AutoModelForCausalLM.from_config(config)
    randomise(model, seed=3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def random_forest(rng: np.random.Generator) -> Forest:
    """Two trees of random tokens: one with nested children, one of a root alone."""

    def segment(tokens: int, parent: int = -1) -> Segment:
        return Segment(rng.integers(5, 290, tokens), parent)

    nested = (segment(21), segment(7, 0), segment(9, 0), segment(1, 2), segment(5, 2))
    return Forest.of([Tree(nested), Tree((segment(13),))])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_path_has_the_logits_of_transformers(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    theirs = write(name, MODELS[name], tmp_path)
    theirs.set_attn_implementation("eager")  # the "sdpa" of transformers 5.17 leaves soft caps out
    ours = load_text_model(tmp_path)
    assert isinstance(ours.decoder, TransformersDecoder)
    forest = random_forest(rng)
    packed = ours.decoder.head.capped(ours(forest) @ ours.decoder.head_weight.T)
    for path in forest.paths():
        assert_close(packed[path], theirs(input_ids=forest.token_ids[path][None]).logits[0], ROUNDING)
    rows = response_logit_rows(forest)
    assert_close(ours.decoder.head.capped(ours(forest, rows) @ ours.decoder.head_weight.T), packed[rows], ROUNDING)


@pytest.mark.parametrize("name", ["olmo2", "granite", "qwen3_5_text"])
@torch.no_grad()
def test_a_saved_model_is_read_by_transformers_and_as_an_r_scorer(
    name: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    write(name, MODELS[name], tmp_path / "base")
    model = load_text_model(tmp_path / "base")
    for parameter in model.parameters():
        parameter += 0.01 * torch.randn_like(parameter)
    save_text_model(model, tmp_path / "saved")
    forest = random_forest(rng)
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    packed = model.decoder.head.capped(model(forest) @ model.decoder.head_weight.T)
    for path in forest.paths():
        assert_close(packed[path], theirs(input_ids=forest.token_ids[path][None]).logits[0], ROUNDING)
    scorer = load_scorer(tmp_path / "saved")
    assert torch.equal(scorer(forest), model(forest))


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_exact_is_refused_by_name(name: str, tmp_path: Path) -> None:
    options, named = REFUSED[name]
    write(name, options, tmp_path)
    with pytest.raises(InputError, match=rf"(?s){named}.*Fix: choose a checkpoint of another family"):
        load_text_model(tmp_path)


def test_weights_that_are_quantised_already_are_refused_by_name(tmp_path: Path) -> None:
    write("olmo2", {}, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="quantization_config.*whole weights"):
        load_text_model(tmp_path)


def test_settings_of_far_more_weights_than_the_files_hold_are_refused(tmp_path: Path) -> None:
    write("olmo2", {}, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"hidden_size": 4096}))
    with pytest.raises(InputError, match="its files hold"):
        load_text_model(tmp_path)
